// An emulated thread block. Its threads are fibers of one operating-system thread, which a seeded random
// scheduler switches at every synchronising instruction. All instructions that touch memory come here to
// be checked: shared memory for races, global memory for bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

namespace flashcute::emulation {

/// What an emulated kernel did wrong: a race, a deadlock, an access where it may not.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What each byte of global memory may be used for. A kernel may not touch what is not registered.
class GlobalMemory {
 public:
  /// result: an output that the kernel may read and store again once it has stored it. unset_sum: it is stored once,
  /// and then added to.
  enum class Use : uint8_t { none, input, output, written, sum, unset_sum, result, stored_result };

  /// Registers memory, none of which may be used until `allow` says so.
  void add(void const* base, size_t bytes);
  void allow(void const* address, size_t bytes, Use use);
  void check_read(void const* address, size_t bytes);
  /// Stores; a second store to the same byte is a violation.
  void write(void* to, void const* from, size_t bytes);
  void add_to(float* to, float x);
  /// Bytes that may be used so, of all memory.
  size_t count(Use use) const;

 private:
  struct Region {
    uintptr_t base;
    std::vector<Use> use;
  };
  Use* find(void const* address, size_t bytes);

  std::vector<Region> regions_;
};

/// The kernel's part of a launch: given the address of shared memory. The address is only a name: memory
/// that is accessed without an instruction faults.
using Kernel = std::function<void(void* shared)>;

/// Runs one block of `threads` threads to its end. Throws Violation with the first thing that goes wrong.
void run_block(uint32_t block_index, int threads, size_t shared_bytes, uint64_t seed, GlobalMemory& memory,
               Kernel const& kernel);

/// Where an instruction is in the program.
struct Site {
  char const* file;
  int line;

  bool operator<(Site const& other) const;
};

/// A thread block of a grid of `blocks`, with what Hopper has beside the threads: an engine that copies, and tensor
/// cores that multiply for a warpgroup while its threads go on. Both work at any time until somebody has waited for
/// them: until then the place that a copy goes to, and the accumulators of a product, hold NaN. Shared memory is plain
/// memory: accesses are not checked, so what tells a race is the result. Waits and arrivals at `broken` do nothing;
/// `seen`, if not null, collects the sites of all others.
struct Sm90Block {
  uint32_t index, blocks;
  int threads;
  size_t shared_bytes;
  uint64_t seed;
  Site const* broken = nullptr;
  std::set<Site>* seen = nullptr;

  void run(GlobalMemory& memory, Kernel const& kernel) const;
};

// ---- what instructions are made of: for emulated threads ------------------------------------------

int thread_index();
uint32_t block_index();
uint32_t block_count();

/// Waits for all threads of the block, at the same place in the program.
void block_sync(char const* file, int line);
/// The same, and whether any thread passed true.
bool block_any(bool x, char const* file, int line);

/// Waits until all lanes of the warp have come to the instruction `name`; one of them then executes it, given
/// the operands of every lane.
void warp_instruction(char const* name, void* operands, void (*execute)(void* const* lanes));

/// Starts copying to shared memory, or zeros if `exists` is false. They arrive at any time until the thread
/// has waited.
void start_copy(void const* from, void* to, size_t bytes, bool exists);
void wait_for_copies();

void store_shared(void* to, void const* from, size_t bytes);
void load_shared(void* to, void const* from, size_t bytes);
/// A load that several lanes of the current warp take part in, so that no lane's own order protects it.
void load_shared_by_warp(void* to, void const* from, size_t bytes);
void store_global(void* to, void const* from, size_t bytes);
void add_global(float* to, float x);
void load_global(void* to, void const* from, size_t bytes);

// ---- the same, of Hopper's ---------------------------------------------------------------------------

/// Barriers that count arrivals and bytes, known by their addresses.
void barrier_init(void* barrier, int arrivals);
void barrier_arrive(void* barrier, int times, int bytes, Site site);
void barrier_wait(void* barrier, uint32_t parity, Site site);
/// 1 if the phase is over and the answer was not too early, which may happen at any time.
uint32_t barrier_passed(void* barrier, uint32_t parity, Site site);

/// Barriers of some of the threads, by number.
void named_arrive(int id, int threads, Site site);
void named_sync(int id, int threads, Site site);

/// A copy by the engine: `bytes` are counted at the barrier when it is done.
void start_bulk_copy(std::function<void()> copy, void* barrier, int bytes);
void check_global_read(void const* address, size_t bytes);

/// This thread's part of its warpgroup's next product, which is executed, given all 128 parts and their accumulators,
/// after all have come. The accumulators are `count` floats at `sums`.
void issue_product(std::shared_ptr<void> part, float* sums, int count,
                   void (*execute)(std::shared_ptr<void> const* parts, float* const* sums));
void commit_products();
void wait_for_products(int pending);

}  // namespace flashcute::emulation
