#include "emulator.hpp"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <bitset>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FLASHCUTE_EMULATION_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FLASHCUTE_EMULATION_ASAN
#endif
#if defined(FLASHCUTE_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace flashcute::emulation {
namespace {

constexpr int warp_size = 32;
constexpr size_t max_shared_bytes = 256 * 1024;

[[noreturn]] void violate(std::string const& what) { throw Violation(what); }

std::string hex(void const* address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", address);
  return text;
}

// ---- fibers --------------------------------------------------------------------------------------

/// Memory without access rights, for addresses that are only names and for what lies below a stack.
void* reserve(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

/// Where an execution stands that is not running now.
struct Execution {
  ucontext_t context;
  void* jump[5];  // what __builtin_setjmp keeps
  bool started = false;
  void const* stack = nullptr;  // for the sanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

Execution* previous = nullptr;  // whom the running one was switched to from

[[noreturn, gnu::noinline]] void resume(Execution& e) {
  if (e.started) __builtin_longjmp(e.jump, 1);
  e.started = true;
  setcontext(&e.context);
  std::abort();
}

/// Suspends `from` (for good if `last`) and resumes `to`. Not by swapcontext, which makes two system calls, nor
/// by longjmp, which sanitizers and the C library do not let leave its stack.
[[gnu::noinline]] void switch_to(Execution& from, Execution& to, [[maybe_unused]] bool last = false) {
  previous = &from;
#if defined(FLASHCUTE_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  if (__builtin_setjmp(from.jump) == 0) resume(to);
#if defined(FLASHCUTE_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

/// A stack with a guard page below it.
class Stack {
 public:
  static constexpr size_t bytes = 512 * 1024;

  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), memory_(static_cast<char*>(reserve(guard_ + bytes))) {
    if (mprotect(bottom(), bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  Stack(Stack const&) = delete;
  Stack& operator=(Stack const&) = delete;
  ~Stack() { munmap(memory_, guard_ + bytes); }

  /// Makes `e` start with `entry` on this stack, whatever an earlier fiber left there.
  void prepare(Execution& e, void (*entry)()) {
#if defined(FLASHCUTE_EMULATION_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(bottom(), bytes);
#endif
    getcontext(&e.context);
    e.context.uc_stack.ss_sp = bottom();
    e.context.uc_stack.ss_size = bytes;
    e.context.uc_link = nullptr;
    makecontext(&e.context, entry, 0);
    e.started = false;
    e.stack = bottom();
    e.stack_bytes = bytes;
    e.fake_stack = nullptr;
  }

 private:
  char* bottom() { return memory_ + guard_; }

  size_t guard_;
  char* memory_;
};

Stack& stack_of(int thread) {
  static std::vector<std::unique_ptr<Stack>> stacks;
  while (static_cast<int>(stacks.size()) <= thread) stacks.push_back(std::make_unique<Stack>());
  return *stacks[static_cast<size_t>(thread)];
}

// ---- shared memory -------------------------------------------------------------------------------

/// Who accesses: a thread, or several lanes of a warp at once.
struct Accessor {
  char const* what;
  int id;

  static constexpr int first_warp = 1 << 20;
  static Accessor thread(char const* what, int thread) { return {what, thread}; }
  static Accessor warp(char const* what, int thread) { return {what, first_warp + thread / warp_size}; }

  std::string text() const {
    return std::string(what) +
           (id < first_warp ? " by thread " + std::to_string(id) : " by warp " + std::to_string(id - first_warp));
  }
};

/// The last accesses to two bytes of shared memory. Between different threads only block_sync orders
/// anything, so accesses are ordered if they are in different epochs: the numbers of block_syncs so far.
struct Cell {
  int write_epoch = -1, read_epoch = -1;
  Accessor writer{}, reader{};
  bool many_readers = false;  // others than `reader` have read in read_epoch
  bool in_flight = false;     // the writer is an asynchronous copy that has not been waited for
};
constexpr size_t cell_bytes = 2;

/// Bytes in shared memory with the history of every access.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes, std::byte{0xff}), cells_((bytes + cell_bytes - 1) / cell_bytes) {
    if (bytes > max_shared_bytes) violate("too much shared memory");
  }

  /// Memory that is accessed without instructions, in which NaN is written.
  static void* plain(size_t bytes) {
    static auto* const p = static_cast<std::byte*>(std::aligned_alloc(1024, max_shared_bytes));
    std::memset(p, 0xff, bytes);
    return p;
  }

  /// The address that the kernel knows.
  static void* address() {
    static void* const p = reserve(max_shared_bytes);
    return p;
  }

  std::byte* data(size_t offset) { return &bytes_[offset]; }

  size_t offset(void const* address_, size_t bytes) const {
    size_t const offset = reinterpret_cast<uintptr_t>(address_) - reinterpret_cast<uintptr_t>(address());
    if (offset >= bytes_.size() || bytes_.size() - offset < bytes) {
      violate("access to " + hex(address_) + ", which is not in shared memory");
    }
    if (offset % bytes != 0) {
      violate("misaligned access of " + std::to_string(bytes) + " bytes to shared memory at " + std::to_string(offset));
    }
    return offset;
  }

  void read(size_t offset, size_t bytes, Accessor reader) {
    for_each_cell(offset, bytes, [&](Cell& c, size_t at) {
      if (c.write_epoch < 0)
        violate(reader.text() + " of shared memory that nobody has written, at " + std::to_string(at));
      check_writer(c, at, reader);
      c.many_readers = c.read_epoch == epoch && (c.many_readers || c.reader.id != reader.id);
      c.read_epoch = epoch;
      c.reader = reader;
    });
  }

  void write(size_t offset, size_t bytes, Accessor writer, bool in_flight) {
    for_each_cell(offset, bytes, [&](Cell& c, size_t at) {
      check_writer(c, at, writer);
      if (c.read_epoch == epoch && (c.many_readers || c.reader.id != writer.id)) race(c.reader, writer, at);
      c.write_epoch = epoch;
      c.writer = writer;
      c.in_flight = in_flight;
    });
  }

  /// The asynchronous copy to `offset` has been waited for: for its own thread it is done.
  void arrive(size_t offset, size_t bytes) {
    for_each_cell(offset, bytes, [&](Cell& c, size_t) {
      c.write_epoch = epoch;
      c.in_flight = false;
    });
  }

  int epoch = 0;

 private:
  template <class F>
  void for_each_cell(size_t offset, size_t bytes, F&& f) {
    for (size_t at = offset; at < offset + bytes; at += cell_bytes) f(cells_[at / cell_bytes], at);
  }

  void check_writer(Cell const& c, size_t at, Accessor accessor) const {
    if (c.in_flight) {
      violate("race at byte " + std::to_string(at) + " of shared memory: " + accessor.text() + " while " +
              c.writer.text() + " is in flight");
    }
    if (c.write_epoch == epoch && c.writer.id != accessor.id) race(c.writer, accessor, at);
  }

  [[noreturn]] static void race(Accessor first, Accessor second, size_t at) {
    violate("race at byte " + std::to_string(at) + " of shared memory: " + first.text() + " and " + second.text() +
            " with no block_sync between them");
  }

  std::vector<std::byte> bytes_;  // NaN in all element types until it is written
  std::vector<Cell> cells_;
};

// ---- the block -----------------------------------------------------------------------------------

struct AsyncCopy {
  void const* from;
  size_t to, bytes;
  bool exists;
  bool delivered;
};

/// An instruction that waits for other threads; where it is in the program, if it tells.
struct Meeting {
  char const* name = "";
  char const* file = nullptr;
  int line = 0;

  bool operator==(Meeting const& other) const {
    return line == other.line && std::strcmp(name, other.name) == 0 && (!file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    return std::string(name) + (file ? std::string(" in ") + file + ":" + std::to_string(line) : "");
  }
};

/// A thread's part of a product that it has not waited for.
struct Pending {
  size_t product;
  int batch;
  float* sums;
  size_t count;
};

struct Thread {
  Execution execution;
  std::vector<AsyncCopy> copies;  // not waited for yet
  Meeting waits_at;
  bool exited = false;
  // Hopper's:
  void const* waits_on = nullptr;  // what has to change before the thread may look again
  size_t products = 0;             // issued
  int batches = 0;                 // committed
  std::vector<Pending> pending;
  std::map<float*, std::vector<float>> hidden;  // accumulators of products that have not been waited for
};

/// A product of a warpgroup, its threads' parts and accumulators.
struct Product {
  std::array<std::shared_ptr<void>, 128> parts;
  std::array<float*, 128> sums{};
  size_t issued = 0;
  void (*execute)(std::shared_ptr<void> const*, float* const*) = nullptr;
  bool done = false;
};

struct Warpgroup {
  std::deque<Product> products;
  size_t done = 0;
};

/// What the hardware prefers to do of what it has to do.
enum class Order { any, copies_first, products_first, oldest_copies_last };

/// A barrier in shared memory.
struct ByteBarrier {
  int arrivals, missing, bytes;
  uint32_t phase;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  uint64_t generation = 0;
  std::array<std::bitset<1024>, 2> who;  // has arrived and gone on; has arrived and waits
};

/// Lanes of a warp that have come to an instruction which waits for the others.
struct Gate {
  Meeting meeting;
  uint32_t arrived = 0;
  void* operands[warp_size];
};

class Block {
 public:
  Block(uint32_t index, int threads, size_t shared_bytes, uint64_t seed, GlobalMemory& memory, Kernel const& kernel,
        Sm90Block const* sm90 = nullptr)
      : index_(index),
        threads_(static_cast<size_t>(threads)),
        warps_(static_cast<size_t>(threads / warp_size)),
        runnable_(warps_.size(), ~0u),
        shared_(shared_bytes),
        random_state_(seed),
        memory_(memory),
        kernel_(kernel),
        sm90_(sm90),
        shared_address_(sm90 != nullptr ? SharedMemory::plain(shared_bytes) : SharedMemory::address()),
        warpgroups_(static_cast<size_t>((threads + 127) / 128)),
        hardware_delay_(random(2) == 0 ? 0 : size_t{16} << 3 * random(4)),
        order_(static_cast<Order>(random(4))) {
    if (threads <= 0 || threads % warp_size != 0) throw std::invalid_argument("threads must come in warps");
  }

  /// Returns what went wrong, if anything.
  std::optional<std::string> run() {
    running = this;
    for (int t = 0; t < static_cast<int>(threads_.size()); ++t) stack_of(t).prepare(thread(t).execution, &enter);
    main_.started = true;
    switch_to(main_, next());
    running = nullptr;
    return failure_;
  }

  static Block* running;

  int thread_index() const { return current_; }
  uint32_t index() const { return index_; }

  bool sync(Meeting place, bool x) {
    meet(place, sync_place_, synced_ == 0);
    any_ = any_ || x;
    if (++synced_ == threads_.size()) {
      synced_ = 0;
      any_of_last_ = std::exchange(any_, false);
      ++shared_.epoch;
      for (uint32_t& lanes : runnable_) lanes = ~0u;
    }
    suspend();
    return any_of_last_;  // no thread comes to the next one's end before all have returned from this
  }

  void warp_instruction(char const* name, void* operands, void (*execute)(void* const*)) {
    Gate& gate = warps_[static_cast<size_t>(current_ / warp_size)];
    meet({name}, gate.meeting, gate.arrived == 0);
    gate.operands[current_ % warp_size] = operands;
    gate.arrived |= 1u << current_ % warp_size;
    if (gate.arrived == ~0u) {
      execute(gate.operands);
      gate.arrived = 0;
      runnable_[static_cast<size_t>(current_ / warp_size)] = ~0u;
    }
    suspend();
  }

  void start_copy(void const* from, void* to, size_t bytes, bool exists) {
    size_t const offset = shared_.offset(to, bytes);
    if (exists) memory_.check_read(from, bytes);
    shared_.write(offset, bytes, Accessor::thread("cp.async", current_), true);
    auto& copies = thread(current_).copies;
    copies.push_back({from, offset, bytes, exists, false});
    if (random(4) == 0) deliver(copies.back());
  }

  void wait_for_copies() {
    auto& copies = thread(current_).copies;
    while (!copies.empty()) {
      std::swap(copies[random(copies.size())], copies.back());
      deliver(copies.back());
      shared_.arrive(copies.back().to, copies.back().bytes);
      copies.pop_back();
    }
    runnable_[static_cast<size_t>(current_ / warp_size)] |= 1u << current_ % warp_size;
    suspend();
  }

  void store_shared(void* to, void const* from, size_t bytes) {
    if (sm90_ != nullptr) {
      std::memcpy(to, from, bytes);
      return;
    }
    size_t const offset = shared_.offset(to, bytes);
    shared_.write(offset, bytes, Accessor::thread("store", current_), false);
    std::memcpy(shared_.data(offset), from, bytes);
  }

  void load_shared(void* to, void const* from, size_t bytes, Accessor reader) {
    if (sm90_ != nullptr) {
      std::memcpy(to, from, bytes);
      return;
    }
    size_t const offset = shared_.offset(from, bytes);
    shared_.read(offset, bytes, reader);
    std::memcpy(to, shared_.data(offset), bytes);
  }

  void store_global(void* to, void const* from, size_t bytes) { memory_.write(to, from, bytes); }

  void add_global(float* to, float x) { memory_.add_to(to, x); }

  void load_global(void* to, void const* from, size_t bytes) {
    memory_.check_read(from, bytes);
    std::memcpy(to, from, bytes);
  }

  void check_global_read(void const* address, size_t bytes) { memory_.check_read(address, bytes); }

  // ---- Hopper's ----

  uint32_t blocks() const { return sm90_ != nullptr ? sm90_->blocks : 1; }

  void init_barrier(void* barrier, int arrivals) { barriers_[barrier] = {arrivals, arrivals, 0, 0}; }

  void arrive(void* barrier, int times, int bytes, Site site) {
    if (does_nothing(site)) return;
    ByteBarrier& b = find_barrier(barrier);
    b.missing -= times;
    b.bytes += bytes;
    if (b.missing < 0) violate("more arrivals at a barrier than it was made for, at " + text_of(site));
    end_phase_if_complete(barrier);
    yield();
  }

  void count_bytes(void* barrier, int bytes) {
    find_barrier(barrier).bytes -= bytes;
    end_phase_if_complete(barrier);
  }

  void wait(void* barrier, uint32_t parity, Site site) {
    if (does_nothing(site)) return;
    while (find_barrier(barrier).phase == parity) wait_on(barrier, {"barrier_wait", site.file, site.line});
    yield();
  }

  uint32_t passed(void* barrier, uint32_t parity, Site site) {
    if (does_nothing(site)) return 1;
    return find_barrier(barrier).phase != parity && random(2) == 0;
  }

  void arrive_named(int id, int threads, Site site) {
    if (does_nothing(site)) return;
    arrive_named(id, threads, false);
    yield();
  }

  void arrive_named(int id, int threads, bool waits) {
    NamedBarrier& b = named_.at(static_cast<size_t>(id));
    if (b.arrived > 0 && b.threads != threads) violate("a barrier of different numbers of threads");
    b.threads = threads;
    auto who = b.who[waits][static_cast<size_t>(current_)];
    if (who) {
      violate("thread " + std::to_string(current_) + " arrives at barrier " + std::to_string(id) +
              " again before the others have come");
    }
    who = true;
    if (++b.arrived == threads) {
      b.arrived = 0;
      b.who = {};
      ++b.generation;
      wake(&b);
    }
  }

  void sync_named(int id, int threads, Site site) {
    if (does_nothing(site)) return;
    NamedBarrier& b = named_.at(static_cast<size_t>(id));
    uint64_t const generation = b.generation;
    arrive_named(id, threads, true);
    while (b.generation == generation) wait_on(&b, {"named_sync", site.file, site.line});
  }

  void start_job(std::function<void()> job) {
    jobs_.push_back(std::move(job));
    yield();
  }

  void issue_product(std::shared_ptr<void> part, float* sums, int count,
                     void (*execute)(std::shared_ptr<void> const*, float* const*)) {
    Thread& own = thread(current_);
    Warpgroup& group = warpgroups_[static_cast<size_t>(current_ / 128)];
    size_t const index = own.products++;
    if (group.products.size() <= index) group.products.resize(index + 1);
    Product& product = group.products[index];
    auto const size = static_cast<size_t>(count);
    auto const [hidden, is_new] = own.hidden.try_emplace(sums, sums, sums + size);
    if (is_new) std::fill(sums, sums + size, std::numeric_limits<float>::quiet_NaN());
    auto const place = static_cast<size_t>(current_ % 128);
    product.parts[place] = std::move(part);
    product.sums[place] = hidden->second.data();
    product.execute = execute;
    ++product.issued;
    own.pending.push_back({index, own.batches, sums, size});
    yield();
  }

  void commit_products() { ++thread(current_).batches; }

  void wait_for_products(int pending) {
    Thread& own = thread(current_);
    Warpgroup& group = warpgroups_[static_cast<size_t>(current_ / 128)];
    int const open = own.batches - pending;
    std::vector<Pending> waited;
    while (!own.pending.empty() && own.pending.front().batch < open) {
      waited.push_back(own.pending.front());
      own.pending.erase(own.pending.begin());
    }
    for (Pending const& p : waited) {
      while (!group.products[p.product].done) wait_on(&group, {"wait_for_products"});
    }
    for (Pending const& p : waited) {
      bool const used = std::any_of(own.pending.begin(), own.pending.end(), [&](auto& q) { return q.sums == p.sums; });
      auto const hidden = own.hidden.find(p.sums);
      if (used || hidden == own.hidden.end()) continue;
      std::copy(hidden->second.begin(), hidden->second.end(), p.sums);
      own.hidden.erase(hidden);
    }
    yield();
  }

 private:
  static std::string text_of(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

  /// Whether the test has taken out what is done here.
  bool does_nothing(Site site) {
    if (sm90_ == nullptr || site.line == 0) return false;
    if (sm90_->seen != nullptr) sm90_->seen->insert(site);
    return sm90_->broken != nullptr && !(site < *sm90_->broken) && !(*sm90_->broken < site);
  }

  ByteBarrier& find_barrier(void* barrier) {
    auto const found = barriers_.find(barrier);
    if (found == barriers_.end()) violate("a barrier that nobody has made");
    return found->second;
  }

  void end_phase_if_complete(void* barrier) {
    ByteBarrier& b = find_barrier(barrier);
    if (b.missing != 0 || b.bytes != 0) return;
    b.missing = b.arrivals;
    b.phase ^= 1;
    wake(barrier);
  }

  void make_runnable(int t) { runnable_[static_cast<size_t>(t / warp_size)] |= 1u << t % warp_size; }

  void yield() {
    make_runnable(current_);
    suspend();
  }

  void wait_on(void const* what, Meeting place) {
    thread(current_).waits_on = what;
    thread(current_).waits_at = place;
    suspend();
  }

  void wake(void const* what) {
    for (size_t t = 0; t < threads_.size(); ++t) {
      if (threads_[t].waits_on != what) continue;
      threads_[t].waits_on = nullptr;
      make_runnable(static_cast<int>(t));
    }
  }

  /// The engine or the tensor cores do something; false if they have nothing to do.
  bool advance_hardware() {
    std::vector<Warpgroup*> ready;
    for (Warpgroup& group : warpgroups_) {
      if (group.done < group.products.size() && group.products[group.done].issued == 128) ready.push_back(&group);
    }
    if (jobs_.empty() && ready.empty()) return false;
    size_t choice = random(jobs_.size() + ready.size());
    if (order_ == Order::copies_first && !jobs_.empty()) choice = random(jobs_.size());
    if (order_ == Order::products_first && !ready.empty()) choice = jobs_.size() + random(ready.size());
    if (order_ == Order::oldest_copies_last && choice < jobs_.size()) choice = jobs_.size() - 1;
    if (choice < jobs_.size()) {
      auto const job = std::move(jobs_[choice]);
      jobs_.erase(jobs_.begin() + static_cast<std::ptrdiff_t>(choice));
      job();
      return true;
    }
    Warpgroup& group = *ready[choice - jobs_.size()];
    Product& product = group.products[group.done++];
    product.execute(product.parts.data(), product.sums.data());
    product.parts = {};
    product.done = true;
    wake(&group);
    return true;
  }

  /// The current thread comes to `own`, and must find others that came before it at the same place.
  void meet(Meeting own, Meeting& others, bool first) {
    if (!first && !(own == others)) {
      violate("divergence: thread " + std::to_string(current_) + " waits at " + own.text() + ", others at " +
              others.text());
    }
    thread(current_).waits_at = others = own;
  }

  Thread& thread(int i) { return threads_[static_cast<size_t>(i)]; }

  /// What every thread executes, on its own stack.
  static void enter() {
#if defined(FLASHCUTE_EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &previous->stack, &previous->stack_bytes);
#endif
    running->live();
  }

  void live() {
    try {
      kernel_(shared_address_);
      if (!thread(current_).pending.empty()) violate("a thread exits with products that it has not waited for");
      if (!thread(current_).copies.empty()) {
        violate("thread " + std::to_string(current_) + " exits with asynchronous copies in flight");
      }
    } catch (std::exception const& e) {
      failure_ = e.what();  // the other threads are never resumed
    }
    Execution& own = thread(current_).execution;
    thread(current_).exited = true;
    switch_to(own, failure_ ? main_ : next(), true);
  }

  /// Lets others run until the current thread is runnable again and its turn comes.
  void suspend() {
    Execution& own = thread(current_).execution;
    Execution& other = next();
    if (&other != &own) switch_to(own, other);
  }

  /// Chooses the thread to run next. A warp is often chosen many times in a row, so that warps get far
  /// ahead of each other. Copies arrive meanwhile.
  Execution& next() {
    if (random(8) == 0) {
      auto& copies = threads_[random(threads_.size())].copies;
      if (!copies.empty()) deliver(copies[random(copies.size())]);
    }
    if (hardware_delay_ > 0 && random(hardware_delay_) == 0) advance_hardware();
    if (random(64) == 0) favourite_ = random(warps_.size());
    do {
      for (size_t i = 0; i < warps_.size(); ++i) {
        size_t const warp = (favourite_ + i) % warps_.size();
        if (runnable_[warp] == 0) continue;
        int const skip = static_cast<int>(random(warp_size));
        int const lane = (std::countr_zero(std::rotr(runnable_[warp], skip)) + skip) % warp_size;
        runnable_[warp] &= ~(1u << lane);
        current_ = static_cast<int>(warp) * warp_size + lane;
        return thread(current_).execution;
      }
    } while (advance_hardware());
    size_t exited = 0;
    std::string waiting;
    for (Thread const& t : threads_) {
      exited += t.exited;
      if (!t.exited && waiting.empty()) {
        waiting = "thread " + std::to_string(&t - threads_.data()) + " waits at " + t.waits_at.text();
      }
    }
    if (exited < threads_.size()) {
      failure_ = "deadlock: " + waiting + " for others, of which " + std::to_string(exited) + " have exited";
    }
    return main_;
  }

  void deliver(AsyncCopy& copy) {
    if (copy.delivered) return;
    copy.delivered = true;
    if (copy.exists) {
      std::memcpy(shared_.data(copy.to), copy.from, copy.bytes);
    } else {
      std::memset(shared_.data(copy.to), 0, copy.bytes);
    }
  }

  /// A random number below n (splitmix64: Steele, Lea, Flood, OOPSLA 2014).
  size_t random(size_t n) {
    uint64_t z = random_state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<size_t>((z ^ (z >> 31)) % n);
  }

  uint32_t index_;
  std::vector<Thread> threads_;
  std::vector<Gate> warps_;
  std::vector<uint32_t> runnable_;  // lanes of each warp that wait for nothing but their turn
  size_t favourite_ = 0;            // warp that is chosen if it can run
  int current_ = 0;
  size_t synced_ = 0;
  Meeting sync_place_;
  bool any_ = false, any_of_last_ = false;
  SharedMemory shared_;
  uint64_t random_state_;
  GlobalMemory& memory_;
  Kernel const& kernel_;
  Sm90Block const* sm90_;
  void* shared_address_;
  std::vector<Warpgroup> warpgroups_;
  std::map<void*, ByteBarrier> barriers_;
  std::array<NamedBarrier, 16> named_;
  std::vector<std::function<void()>> jobs_;  // of the copy engine
  size_t hardware_delay_;  // the hardware goes on once in so many turns; 0: only when every thread waits
  Order order_;
  Execution main_;
  std::optional<std::string> failure_;
};

Block* Block::running = nullptr;

}  // namespace

// ---- global memory -------------------------------------------------------------------------------

void GlobalMemory::add(void const* base, size_t bytes) {
  regions_.push_back({reinterpret_cast<uintptr_t>(base), std::vector<Use>(bytes, Use::none)});
}

GlobalMemory::Use* GlobalMemory::find(void const* address, size_t bytes) {
  for (Region& r : regions_) {
    size_t const offset = reinterpret_cast<uintptr_t>(address) - r.base;
    if (offset < r.use.size() && r.use.size() - offset >= bytes) return &r.use[offset];
  }
  violate("access to " + hex(address) + ", which is in no tensor's memory");
}

void GlobalMemory::allow(void const* address, size_t bytes, Use use) {
  Use* const u = find(address, bytes);
  for (size_t i = 0; i < bytes; ++i) u[i] = use;
}

/// What a word of so many bytes has to be aligned to.
constexpr size_t alignment_of(size_t bytes) { return bytes & (~bytes + 1); }

void GlobalMemory::check_read(void const* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % alignment_of(bytes) != 0) violate("misaligned read of global memory");
  Use const* const u = find(address, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    if (u[i] != Use::input && u[i] != Use::stored_result)
      violate("read of global memory that is no element of an input, at " + hex(address));
  }
}

void GlobalMemory::write(void* to, void const* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % alignment_of(bytes) != 0) violate("misaligned store to global memory");
  Use* const u = find(to, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    if (u[i] == Use::result || u[i] == Use::stored_result) {
      u[i] = Use::stored_result;
      continue;
    }
    if (u[i] == Use::unset_sum) {
      u[i] = Use::sum;
      continue;
    }
    if (u[i] == Use::written) violate("second store to the same element of an output, at " + hex(to));
    if (u[i] != Use::output) violate("store to global memory that is no element of an output, at " + hex(to));
    u[i] = Use::written;
  }
  std::memcpy(to, from, bytes);
}

void GlobalMemory::add_to(float* to, float x) {
  Use const* const u = find(to, sizeof(float));
  for (size_t i = 0; i < sizeof(float); ++i) {
    if (u[i] != Use::sum) violate("addition to global memory that is no element of a sum, at " + hex(to));
  }
  *to += x;
}

size_t GlobalMemory::count(Use use) const {
  size_t n = 0;
  for (Region const& r : regions_) {
    for (Use u : r.use) n += u == use;
  }
  return n;
}

// ---- interface -----------------------------------------------------------------------------------

void run_block(uint32_t block_index, int threads, size_t shared_bytes, uint64_t seed, GlobalMemory& memory,
               Kernel const& kernel) {
  Block block(block_index, threads, shared_bytes, seed, memory, kernel);
  if (auto const failure = block.run()) {
    throw Violation(*failure + " (block " + std::to_string(block_index) + ", seed " + std::to_string(seed) + ")");
  }
}

bool Site::operator<(Site const& other) const {
  int const order = std::strcmp(file, other.file);
  return order < 0 || (order == 0 && line < other.line);
}

void Sm90Block::run(GlobalMemory& memory, Kernel const& kernel) const {
  Block block(index, threads, shared_bytes, seed, memory, kernel, this);
  if (auto const failure = block.run()) {
    throw Violation(*failure + " (block " + std::to_string(index) + ", seed " + std::to_string(seed) + ")");
  }
}

int thread_index() { return Block::running->thread_index(); }

uint32_t block_index() { return Block::running->index(); }

uint32_t block_count() { return Block::running->blocks(); }

void block_sync(char const* file, int line) { Block::running->sync({"block_sync", file, line}, false); }

bool block_any(bool x, char const* file, int line) { return Block::running->sync({"block_any", file, line}, x); }

void warp_instruction(char const* name, void* operands, void (*execute)(void* const* lanes)) {
  Block::running->warp_instruction(name, operands, execute);
}

void start_copy(void const* from, void* to, size_t bytes, bool exists) {
  Block::running->start_copy(from, to, bytes, exists);
}

void wait_for_copies() { Block::running->wait_for_copies(); }

void store_shared(void* to, void const* from, size_t bytes) { Block::running->store_shared(to, from, bytes); }

void load_shared(void* to, void const* from, size_t bytes) {
  Block::running->load_shared(to, from, bytes, Accessor::thread("load", thread_index()));
}

void load_shared_by_warp(void* to, void const* from, size_t bytes) {
  Block::running->load_shared(to, from, bytes, Accessor::warp("ldmatrix", thread_index()));
}

void store_global(void* to, void const* from, size_t bytes) { Block::running->store_global(to, from, bytes); }

void add_global(float* to, float x) { Block::running->add_global(to, x); }

void load_global(void* to, void const* from, size_t bytes) { Block::running->load_global(to, from, bytes); }

void barrier_init(void* barrier, int arrivals) { Block::running->init_barrier(barrier, arrivals); }

void barrier_arrive(void* barrier, int times, int bytes, Site site) {
  Block::running->arrive(barrier, times, bytes, site);
}

void barrier_wait(void* barrier, uint32_t parity, Site site) { Block::running->wait(barrier, parity, site); }

uint32_t barrier_passed(void* barrier, uint32_t parity, Site site) {
  return Block::running->passed(barrier, parity, site);
}

void named_arrive(int id, int threads, Site site) { Block::running->arrive_named(id, threads, site); }

void named_sync(int id, int threads, Site site) { Block::running->sync_named(id, threads, site); }

void start_bulk_copy(std::function<void()> copy, void* barrier, int bytes) {
  Block::running->start_job([copy = std::move(copy), barrier, bytes] {
    copy();
    Block::running->count_bytes(barrier, bytes);
  });
}

void check_global_read(void const* address, size_t bytes) { Block::running->check_global_read(address, bytes); }

void issue_product(std::shared_ptr<void> part, float* sums, int count,
                   void (*execute)(std::shared_ptr<void> const* parts, float* const* sums)) {
  Block::running->issue_product(std::move(part), sums, count, execute);
}

void commit_products() { Block::running->commit_products(); }

void wait_for_products(int pending) { Block::running->wait_for_products(pending); }

}  // namespace flashcute::emulation
