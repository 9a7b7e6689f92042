// An OpenMP runtime with any places, for tests of what the CPU backend makes of them. It pins nobody.
#include <vector>

namespace {
std::vector<std::vector<int>> places;
}

extern "C" {

/// One more place; without CPUs: forgets all places.
void fake_openmp_add_place(int const* cpus, int count) {
  if (count == 0) return places.clear();
  places.emplace_back(cpus, cpus + count);
}

int omp_get_num_places() { return static_cast<int>(places.size()); }
int omp_get_place_num_procs(int place) { return static_cast<int>(places[place].size()); }
void omp_get_place_proc_ids(int place, int* ids) {
  for (int const cpu : places[place]) *ids++ = cpu;
}
}
