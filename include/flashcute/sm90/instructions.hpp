// The instructions of Hopper (compute capability 9.0a) by name: bulk tensor copies (TMA), mbarriers, named barriers,
// register reallocation (setmaxnreg) and warpgroup products (WGMMA, by CuTe's atoms). Everything of the Hopper kernel
// that a host cannot execute is here: tests/cpp/emulation has a header of the same name that stands in for it.
#pragma once

// CuTe has WGMMA for 8, 16, 32, 64, 96, 128, 192 and 256 columns. For others a translation unit defines
// CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED first (src/image/source.cpp does where a configuration asks for it).
#include "flashcute/device/instructions.hpp"
#include "flashcute/sm90/params.hpp"
// These headers do not compile unless device/instructions.hpp has included CuTe's tensor.
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace flashcute::sm90 {

/// The architecture that these headers are compiled for.
inline constexpr Arch sm90_arch = 90;

inline constexpr int warpgroup_size = 128;

/// Tells the compiler that x is the same in all lanes of a warp: it then lives in a uniform register, and branches that
/// depend on it do not diverge.
FLASHCUTE_DEVICE int uniform(int x) {
  return static_cast<int>(__reduce_or_sync(0xffffffffu, static_cast<unsigned>(x)));
}

/// Copies the word to another register.
FLASHCUTE_DEVICE uint32_t moved(uint32_t word) {
  uint32_t result;
  asm volatile("mov.b32 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

/// The same number, opaque to the compiler: what it knows of a loop's flag it would use to split the loop, and then
/// treat the parts as code in which lanes diverge.
FLASHCUTE_DEVICE int opaque(int x) { return uniform(static_cast<int>(moved(static_cast<uint32_t>(x)))); }

/// Synchronises the lanes of the warp.
FLASHCUTE_DEVICE void reconverge() { __syncwarp(); }

/// Lanes of the warp with the same word: how many come before this one, and how many there are.
struct EqualLanes {
  int before, all;
};
FLASHCUTE_DEVICE EqualLanes equals_in_warp(uint32_t word) {
  unsigned const equal = __match_any_sync(0xffffffffu, word);
  return {__popc(equal & ((1u << thread_index() % 32) - 1)), __popc(equal)};
}

/// The same address in shared memory, opaque to the compiler. Otherwise it recomputes the address of every barrier and
/// tile from a special register at each use.
template <class Storage>
FLASHCUTE_DEVICE Storage& hidden(Storage& smem) {
  return *static_cast<Storage*>(__cvta_shared_to_generic(__shfl_sync(0xffffffffu, shared_address(&smem), 0)));
}

FLASHCUTE_DEVICE int warpgroup_index() { return uniform(thread_index() / warpgroup_size); }
FLASHCUTE_DEVICE int warp_of_warpgroup() { return uniform(thread_index() / 32 % (warpgroup_size / 32)); }
FLASHCUTE_DEVICE int thread_of_warpgroup() { return thread_index() % warpgroup_size; }

FLASHCUTE_DEVICE uint32_t block_count() { return gridDim.x; }

/// The rank of this thread block in its cluster.
FLASHCUTE_DEVICE int rank_in_cluster() { return static_cast<int>(cute::block_rank_in_cluster()); }

/// Barrier of all threads of the cluster that have not exited.
FLASHCUTE_DEVICE void cluster_sync() {
  cute::cluster_arrive();
  cute::cluster_wait();
}

/// True in one lane of a converged warp.
FLASHCUTE_DEVICE bool elected_lane() { return cute::elect_one_sync(); }

// Stores to global memory if `exists`, by a predicate and not a branch, so that several stores are in flight.
FLASHCUTE_DEVICE void global_store_if(bool exists, float* to, float x) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.s32 exists, %0, 0;\n"
      "@exists st.global.f32 [%1], %2;\n"
      "}" ::"r"(static_cast<int>(exists)),
      "l"(to), "f"(x)
      : "memory");
}
FLASHCUTE_DEVICE void global_store_if(bool exists, void* to, uint4 const& words) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.s32 exists, %0, 0;\n"
      "@exists st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
      "}" ::"r"(static_cast<int>(exists)),
      "l"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
      : "memory");
}

// ---- registers -----------------------------------------------------------------------------------

/// The warpgroup releases all but `Count` registers per thread.
template <int Count>
FLASHCUTE_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

/// The warpgroup waits until it has `Count` registers per thread.
template <int Count>
FLASHCUTE_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- mbarriers -----------------------------------------------------------------------------------

/// An mbarrier. A phase ends when all arrivals that it was initialised for have come, and all bytes that they
/// announced.
using Barrier = uint64_t;

FLASHCUTE_DEVICE void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals));
}

/// Makes initialised mbarriers visible to TMA and to the cluster. The threads of the block still have to synchronise.
FLASHCUTE_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FLASHCUTE_DEVICE void barrier_arrive(Barrier& barrier, int times = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(times) : "memory");
}

/// Arrives at the mbarrier with the same offset in another thread block of the cluster, or in this one. That releases
/// memory which only WGMMA and TMA accessed, both done. To order ordinary writes for the cluster too would need a
/// release at cluster scope, which costs a fence of the whole GPU each time.
FLASHCUTE_DEVICE void barrier_arrive_at(Barrier& barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

FLASHCUTE_DEVICE void barrier_arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

/// Waits for the end of the phase of this parity. Repeats try_wait without a suspend-time hint: with one it is slower.
FLASHCUTE_DEVICE void barrier_wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

/// Whether the phase of this parity is over: 1 or 0. The answer has a latency: test early what is needed later.
FLASHCUTE_DEVICE uint32_t barrier_passed(Barrier& barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(passed)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return passed;
}

/// Waits, unless `passed` says that the phase is over.
FLASHCUTE_DEVICE void barrier_wait_unless(uint32_t passed, Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "setp.ne.u32 done, %2, 0;\n"
      "@done bra over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity), "r"(passed)
      : "memory");
}

/// The same, and nothing that depends on the `held` numbers is computed before the wait. They keep their values, but
/// after a wait they come from a shuffle with lane mask 0, because ptxas reorders code and does not see that the
/// shuffle changes nothing. `passed` is the same in all lanes of the warp.
FLASHCUTE_DEVICE void barrier_wait_unless(uint32_t passed, Barrier& barrier, uint32_t parity, float (&held)[2]) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "setp.ne.u32 done, %4, 0;\n"
      "@done bra over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%2], %3;\n"
      "@!done bra again;\n"
      "shfl.sync.bfly.b32 %0, %0, 0, 31, -1;\n"
      "shfl.sync.bfly.b32 %1, %1, 0, 31, -1;\n"
      "over:\n"
      "}"
      : "+f"(held[0]), "+f"(held[1])
      : "r"(shared_address(&barrier)), "r"(parity), "r"(passed)
      : "memory");
}

// ---- named barriers ------------------------------------------------------------------------------

/// Arrives with this warp at named barrier `id` (1 to 15), of `Threads` threads, and waits for the others.
template <int Threads>
FLASHCUTE_DEVICE void named_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

/// Arrives with this warp without waiting.
template <int Threads>
FLASHCUTE_DEVICE void named_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

/// Proxy fence: makes what this thread wrote to shared memory visible to WGMMA that begin later.
FLASHCUTE_DEVICE void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Proxy fence: bulk copies to shared memory that begin later come after what this thread wrote there, and those from
/// shared memory see it. It and the thread that begins them still have to synchronise.
FLASHCUTE_DEVICE void publish_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- shared memory -------------------------------------------------------------------------------

/// Stores four 8x8 tiles of 16-bit elements, each transposed, from the registers of a warp to shared memory: lane i
/// passes the address of row i % 8 of tile i / 8. The reverse of ldmatrix.
FLASHCUTE_DEVICE void stmatrix_transposed(void* row, uint32_t d0, uint32_t d1, uint32_t d2, uint32_t d3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(d0), "r"(d1), "r"(d2), "r"(d3)
               : "memory");
}

// ---- products of a warpgroup ---------------------------------------------------------------------
// WGMMA are asynchronous and committed in batches (wgmma groups). Until a batch is done, its accumulators and its
// operands in registers must not be touched, and its operands in shared memory must not change.

/// An operand in shared memory as a tensor of matrix descriptors, of CuTe's type `Descriptor`.
template <class Descriptor, class Operand, class Element>
FLASHCUTE_DEVICE auto described(Element* tile) {
  return cute::make_tensor<Descriptor>(cute::make_tensor(cute::make_smem_ptr(tile), Operand{}));
}

/// Has the descriptor computed here. nvcc 13.0 may otherwise compute it behind the wait for what it describes, where
/// the product waits for it too.
template <class Operand>
FLASHCUTE_DEVICE void described_here(Operand const& operand) {
  asm volatile("" ::"r"(operand.data().desc_.reg32_[0]));
}

/// Makes the descriptor opaque to the compiler, so that what depends on it is recomputed.
template <class Operand>
FLASHCUTE_DEVICE void described_anew(Operand& operand) {
  asm volatile("" : "+r"(operand.data().desc_.reg32_[0]));
}

/// wgmma.fence: orders accesses to the warpgroup's registers before the products that follow.
FLASHCUTE_DEVICE void begin_products() { cute::warpgroup_arrive(); }

/// sums += a b, or = where mma.accumulate_ says so; `mma` is the atom's MMA_Traits.
template <class Mma, class Sums, class A, class B>
FLASHCUTE_DEVICE void multiply(Mma const& mma, Sums& sums, A const& a, B const& b) {
  mma_unpack(mma, sums, a, b, sums);  // the atom's overload, found by argument-dependent lookup
}

/// Ends a batch.
FLASHCUTE_DEVICE void commit_products() { cute::warpgroup_commit_batch(); }

/// Waits until at most `Pending` batches are not done.
template <int Pending>
FLASHCUTE_DEVICE void wait_for_products() {
  cute::warpgroup_wait<Pending>();
}

/// The compiler moves no access to these registers across this place.
template <class Registers>
FLASHCUTE_DEVICE void keep_in_place(Registers& registers) {
  cute::warpgroup_fence_operand(registers);
}

// ---- bulk copies ---------------------------------------------------------------------------------

/// How long a copied tile should stay in the L2 cache: TMA's encoding of the cache policy.
enum class L2Hint : uint64_t { evict_first = 0x12F0000000000000, evict_last = 0x14F0000000000000 };

FLASHCUTE_DEVICE void prefetch(TensorMap const& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Starts copying the box at (column, row, head, batch) of a tensor to the L2 cache.
FLASHCUTE_DEVICE void prefetch_box(TensorMap const& map, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(column), "r"(row),
               "r"(head), "r"(batch)
               : "memory");
}

/// Starts copying `bytes`, a multiple of 16, to shared memory. Both addresses are multiples of 16; the mbarrier counts
/// the bytes.
FLASHCUTE_DEVICE void copy_bulk(void const* from, void* to, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

/// Starts adding floats in shared memory to those at `to`, each atomically. Both addresses, and `bytes`, are multiples
/// of 16.
FLASHCUTE_DEVICE void add_bulk(float* to, float const* from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}

/// Starts storing floats in shared memory to those at `to`, as add_bulk.
FLASHCUTE_DEVICE void store_bulk(float* to, float const* from, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}

/// Waits until all that this thread adds by add_bulk, or stores, but the last `Pending`, has been read from shared
/// memory.
template <int Pending = 0>
FLASHCUTE_DEVICE void await_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

/// Waits until all of these are done, so that release_count publishes them.
FLASHCUTE_DEVICE void await_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/// Proxy fence: bulk copies and additions that this thread starts later come after the counts that it has acquired, or
/// looked at.
FLASHCUTE_DEVICE void keep_bulk_behind() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- counts by which thread blocks wait for each other --------------------------------------------

/// Counts up by one: who acquires it sees what this thread has done, and seen, before.
FLASHCUTE_DEVICE void release_count(uint32_t* number) {
  asm volatile(
      "fence.proxy.async.global;\n"
      "red.release.gpu.global.add.u32 [%0], 1;" ::"l"(number)
      : "memory");
}

/// Tells the number, and acquires what those have released who counted it up.
FLASHCUTE_DEVICE uint32_t acquire_count(uint32_t const* number) {
  uint32_t count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(number) : "memory");
  return count;
}

/// Tells the number alone: for a thread that then only adds or stores in the level 2 cache. PTX's memory model wants an
/// acquiring load here as well, after which ptxas invalidates the first-level cache and waits for the answer at once.
/// We rely on the hardware: what was released is in the level 2 cache before the count is, and an addition behind a
/// branch on the count is started after the answer.
FLASHCUTE_DEVICE uint32_t peek_at_count(uint32_t const* number) {
  uint32_t count;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(number) : "memory");
  return count;
}

/// Waits until the number is `count`.
FLASHCUTE_DEVICE void await_count(uint32_t const* number, uint32_t count) {
  while (acquire_count(number) != count) {
  }
}

/// Starts copying the box at (column, row, head, batch) of a tensor to shared memory; what lies outside the tensor
/// arrives as 0. The mbarrier counts its bytes, including those outside.
FLASHCUTE_DEVICE void copy_box(TensorMap const& map, int column, int row, int head, int batch, void* to,
                               Barrier& barrier, L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

/// The same to the same offset in each of the `blocks` thread blocks of the cluster (multicast); the mbarrier with the
/// same offset in each counts the bytes.
FLASHCUTE_DEVICE void copy_box_to_all(TensorMap const& map, int column, int row, int head, int batch, void* to,
                                      Barrier& barrier, L2Hint hint, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %8, %7;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<uint64_t>(hint)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}

}  // namespace flashcute::sm90
