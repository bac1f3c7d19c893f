// What the probe of a device's topology launches (docs/topology.md). One file without headers: NVRTC, hipRTC, clang's HIP front end
// and, with MK_PROBE_HOST, a host C++ compiler take it. The run time includes it for the structs alone.
//
// A unit is a work-group that has a multiprocessor or compute unit for itself; it is known by where that is, as work-groups start
// elsewhere in every launch. Its first wave is the messenger: it plays ping-pong
// with other units, job by job, or looks at lines of memory one by one. The other waves read blocks of memory: until the messenger is
// done, or a number of bytes. Every loop ends when `limit_ticks` are over.
#ifndef JAX_MONOKERNEL_TOPOLOGY_PROBE_H  // not #pragma once, as this is also compiled for itself
#define JAX_MONOKERNEL_TOPOLOGY_PROBE_H

namespace topology {

typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

// Two units and the word between them. Jobs of a track run one after the other, tracks side by side.
struct Job {
  u32 units;  // the one that asks, and << 16 the one that answers
  u32 place;  // of the word, in units of 32 bytes from `data`
};

struct Range {
  u32 begin, count;
};

// What a unit reports.
struct Unit {
  u32 place;             // CUDA: SM number; ROCm: register HW_ID
  u32 group;             // CUDA: 0; ROCm: register XCC_ID
  u32 failed;            // 1: the limit came before the end, in `job` of its track
  u32 job;
  u64 ticks;             // from begin to end, in the unit of Result
  u64 begin_ns, end_ns;  // of a clock that all units share
  u64 steps;             // of 4 KiB, read
  u64 unused[2];
};
static_assert(sizeof(Unit) == 64, "the host reads an array of these");

// Of a job, in clock ticks: `rounds` times there and back, in the fastest of `batches` and in all of them.
struct Result {
  u32 best, total;
};

// Of the first word of a block, what one lane waited for it, in clock ticks; all ones: not measured.
struct Line {
  u32 first;   // for the first look
  u32 again;   // the fastest of `rounds` more
  u32 change;  // the fastest of `rounds` atomic changes, which leave it as it is
  u32 unused;
};

struct Args {
  char* data;             // blocks, and the words of jobs
  const u32* unit_of;     // [kPlaces]: the number of the unit at a place (arch::place_number), or no unit; null: the work-group's
  const Job* jobs;
  const Range* tracks;    // their jobs
  const i32* track_of;    // [units]; -1: the unit has no messages to pass
  u32* turns;             // [tracks][32], zeros; only the first of each 32: how many of its jobs are done
  Result* results;        // [jobs]
  const u32* blocks;      // their numbers: places in units of 2^block_shift bytes from `data`
  const Range* readings;  // [units]: which of them a unit reads, again and again; none, or at least 8 KiB. Or looks at, once each
  Line* lines;            // [blocks], where units look at them
  Unit* units;            // [units]
  u32 unit_count;
  u32 steps;              // of 4 KiB that each unit reads; 0: until its messenger is done
  u32 block_shift;        // 7 to 12
  u32 batches, rounds, warm_up;  // rounds; at least 1, 1 and 0
  u32 touch;              // before a look the word is read whose place differs from the block's by these bits, so that its page is known; 0: none
  u32 looks;              // 0: units read blocks; 1 to 3: they look at them, and so many fields of Line are wanted. Then there are no jobs
  u32 first_value;        // of the first job's words; no word holds this value, or one of the jobs * 2 * all rounds after it
  u64 limit_ticks;
};

constexpr u32 kStepBytes = 4096, kWordUnit = 32;
constexpr int kReaders = 2, kReaderLanes = 256;  // a reader takes a step at once, 16 bytes a lane
constexpr int kTurnStride = 32, kPlaces = 2048;

}  // namespace topology

#if defined(__CUDA_ARCH__) || defined(__AMDGCN__) || defined(MK_PROBE_HOST)

namespace topology {
namespace arch {

#if defined(__CUDA_ARCH__)

#define MK_FUNCTION static __device__ __forceinline__
#define MK_ENTRY(threads) extern "C" __global__ __launch_bounds__(threads, 1)
constexpr int kWave = 32;
constexpr int kFlight = 16;  // loads of a lane on their way, of each reader 64 KiB: with one reader an H200 reads at 95% of its rate
struct alignas(16) Words {
  u32 x, y, z, w;
};
MK_FUNCTION int unit() { return (int)blockIdx.x; }
MK_FUNCTION int thread() { return (int)threadIdx.x; }
MK_FUNCTION void unit_sync() { __syncthreads(); }
MK_FUNCTION u32 load_word(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MK_FUNCTION void store_word(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
MK_FUNCTION u32 or_word(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.or.b32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
MK_FUNCTION Words load_once(const char* p) {
  Words v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
MK_FUNCTION u64 ticks() {
  u64 v;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(v)::"memory");
  return v;
}
MK_FUNCTION u64 wall_clock() {
  u64 v;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v)::"memory");
  return v;
}
MK_FUNCTION void pause() { __nanosleep(100); }
MK_FUNCTION void spin() {}
// A flag in shared memory.
MK_FUNCTION bool is_set(u32* flag) { return *(volatile u32*)flag != 0; }
MK_FUNCTION void set(u32* flag, u32 v) { *(volatile u32*)flag = v; }
MK_FUNCTION u32 place() {
  u32 v;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(v));
  return v;
}
MK_FUNCTION u32 group() { return 0; }
MK_FUNCTION u32 place_number() { return place(); }

#elif defined(__AMDGCN__)

#define MK_FUNCTION static __attribute__((device, always_inline, unused)) inline
#define MK_ENTRY(threads) \
  extern "C" __attribute__((global, visibility("protected"), amdgpu_flat_work_group_size((threads), (threads))))
constexpr int kWave = 64;
constexpr int kFlight = 8;  // of each reader 32 KiB: others measured an MI300X's highest rate with that
template <typename T>
using Global = __attribute__((address_space(1))) T;
typedef u32 Words __attribute__((ext_vector_type(4)));
MK_FUNCTION int unit() { return (int)__builtin_amdgcn_workgroup_id_x(); }
MK_FUNCTION int thread() { return (int)__builtin_amdgcn_workitem_id_x(); }
MK_FUNCTION void unit_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// With sc1: a store goes through to where all XCDs see it, and a load sees what comes from there.
MK_FUNCTION u32 load_word(const u32* p) {
  return __hip_atomic_load((const Global<u32>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_FUNCTION void store_word(u32* p, u32 v) {
  __hip_atomic_store((Global<u32>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_FUNCTION u32 or_word(u32* p, u32 v) {
  return __hip_atomic_fetch_or((Global<u32>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_FUNCTION Words load_once(const char* p) { return __builtin_nontemporal_load((const Global<Words>*)p); }
MK_FUNCTION u64 ticks() { return __builtin_amdgcn_s_memrealtime(); }  // 100 MHz, the same on the whole device
MK_FUNCTION u64 wall_clock() { return ticks() * 10; }
MK_FUNCTION void pause() { __builtin_amdgcn_s_sleep(4); }
MK_FUNCTION void spin() {}
MK_FUNCTION bool is_set(u32* flag) {
  return __hip_atomic_load((__attribute__((address_space(3))) u32*)flag, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP) != 0;
}
MK_FUNCTION void set(u32* flag, u32 v) {
  __hip_atomic_store((__attribute__((address_space(3))) u32*)flag, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
MK_FUNCTION u32 place() { return __builtin_amdgcn_s_getreg(4 | 31 << 11); }
MK_FUNCTION u32 group() { return __builtin_amdgcn_s_getreg(20 | 3 << 11); }
// XCD, shader engine, array and compute unit. (More than two bits of the engine are not read: gfx942 and gfx950 have four.)
MK_FUNCTION u32 place_number() { return group() << 7 | (place() >> 8 & 0x7f); }

#else  // defined by who includes it: unit(), load_word(), ..., where a wave and a reader are one lane

#define MK_FUNCTION static inline

#endif

}  // namespace arch

// The unit that this work-group is; -1: none.
MK_FUNCTION int unit_number(const Args& a) {
  if (!a.unit_of) return arch::unit();
  const u32 place = arch::place_number();
  const u32 unit = place < (u32)kPlaces ? a.unit_of[place] : a.unit_count;
  return unit < a.unit_count ? (int)unit : -1;
}

// True once `limit` ticks have passed since `begin`.
MK_FUNCTION bool is_over(u64 begin, u64 limit) { return arch::ticks() - begin > limit; }

MK_FUNCTION bool wait_for(const u32* word, u32 value, u64 begin, u64 limit) {
  for (u32 i = 1; arch::load_word(word) != value; i++) {
    arch::spin();
    if (i % 64 == 0 && is_over(begin, limit)) return false;  // the clock takes as long as a look
  }
  return true;
}

MK_FUNCTION bool wait_for_turn(const u32* turn, u32 job, u64 begin, u64 limit) {
  while ((i32)(arch::load_word(turn) - job) < 0) {
    arch::pause();
    if (is_over(begin, limit)) return false;
  }
  return true;
}

// One unit's part of a job. Values go up by 1 from asking to answering and from round to round.
MK_FUNCTION bool play(const Args& a, u32* word, bool asks, u32 value, u64 begin, Result* result) {
  Result found = {0xffffffffu, 0};
  for (u32 batch = 0; batch <= a.batches; batch++) {  // the first one is the warm-up
    const u32 rounds = batch == 0 ? a.warm_up : a.rounds;
    const u64 start = arch::ticks();
    for (u32 i = 0; i < rounds; i++, value += 2) {
      if (asks) {
        arch::store_word(word, value);
        if (!wait_for(word, value + 1, begin, a.limit_ticks)) return false;
      } else {
        if (!wait_for(word, value, begin, a.limit_ticks)) return false;
        arch::store_word(word, value + 1);
      }
    }
    const u32 took = (u32)(arch::ticks() - start);
    if (batch > 0) {
      found.total += took;
      if (took < found.best) found.best = took;
    }
  }
  if (asks) *result = found;
  return true;
}

// The messenger: one lane. Returns the number of its track's jobs that were done in time.
MK_FUNCTION u32 pass_messages(const Args& a, u32 me, const Range& track, u32* turn, u64 begin) {
  const u32 values = 2 * (a.warm_up + a.batches * a.rounds);
  for (u32 k = 0; k < track.count; k++) {
    const u32 j = track.begin + k, units = a.jobs[j].units;
    const bool asks = (units & 0xffffu) == me;
    if (!asks && units >> 16 != me) continue;
    if (!wait_for_turn(turn, k, begin, a.limit_ticks)) return k;
    u32* word = (u32*)(a.data + (u64)a.jobs[j].place * kWordUnit);
    const u32 before = arch::load_word(word);
    const bool played = play(a, word, asks, a.first_value + j * values, begin, a.results + j);
    if (asks) arch::store_word(word, before);  // it may be somebody's data
    if (!played) return k;
    if (asks) arch::store_word(turn, k + 1);
  }
  // Who has no more to do reads on, so that the last job is under the same load as the first.
  return wait_for_turn(turn, track.count, begin, a.limit_ticks) ? track.count : track.count - 1;
}

// One reader's part of the blocks: readers take turns, a step each. Beside messages there is one: so much is on its way to a unit then
// as to one that decodes, and a word waits behind it. Returns how many steps it has read.
MK_FUNCTION u64 read_blocks(const Args& a, int me, int reader, int lane, u32* stop, u64 begin) {
  constexpr int kFlight = arch::kFlight;
  const int readers = a.steps ? kReaders : 1;
  if (a.looks || reader >= readers) return 0;
  const Range reading = a.readings[me];
  const u32 blocks_a_step = kStepBytes >> a.block_shift, round = blocks_a_step * (u32)readers;
  if (reading.count < round) return 0;
  const u32* blocks = a.blocks + reading.begin;
  const u64 wanted = a.steps / (u32)readers;
  const u32 place = (u32)lane * 16;  // in the step
  const char* data = a.data + (place & ((1u << a.block_shift) - 1));
  u32 at = (u32)reader * blocks_a_step + (place >> a.block_shift);
  const auto next = [&] {
    const u32 block = blocks[at];
    at += round;
    if (at >= reading.count) at -= reading.count;
    return block;
  };
  u32 numbers[kFlight];
  for (int i = 0; i < kFlight; i++) numbers[i] = next();
  u32 mix = 0;
  u64 done = 0;
  while ((wanted == 0 ? done == 0 || !arch::is_set(stop) : done < wanted) && !is_over(begin, a.limit_ticks)) {
    arch::Words v[kFlight];
    for (int i = 0; i < kFlight; i++) v[i] = arch::load_once(data + ((u64)numbers[i] << a.block_shift));
    for (int i = 0; i < kFlight; i++) numbers[i] = next();
    for (int i = 0; i < kFlight; i++) mix ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    done += kFlight;
  }
  if (mix == 0x9e3779b9u) a.units[me].unused[0] = mix;  // what is read is used
  return done;
}

// Ticks until an access has its value. The clock may not be read before that: a store that depends on the value stands between.
template <typename Access>
MK_FUNCTION u32 timed(u32* stop, Access access) {
  const u64 start = arch::ticks();
  const u32 value = access();
  if (value == 0x9e3779b9u) arch::set(stop, 1);  // nobody waits for it
  return (u32)(arch::ticks() - start);
}

// The messenger's looks at the unit's blocks: one lane, one access after the other. Returns false if time was over before the last.
MK_FUNCTION bool look_at_lines(const Args& a, int me, u32* stop, u64 begin) {
  const Range mine = a.readings[me];
  for (u32 i = mine.begin; i < mine.begin + mine.count; i++) {
    if (is_over(begin, a.limit_ticks)) return false;
    const u32 block = a.blocks[i];
    if (block == 0xffffffffu) return false;  // is never true, and the clock is not read before the number has come
    const u64 place = (u64)block << a.block_shift;
    u32* word = (u32*)(a.data + place);
    if (a.touch) timed(stop, [&] { return arch::load_word((const u32*)(a.data + (place ^ a.touch))); });
    Line found = {0xffffffffu, 0xffffffffu, 0xffffffffu, 0};
    u32 held = 0;
    const auto read = [&] { return held = arch::load_word(word); };
    found.first = timed(stop, read);
    for (u32 k = 0; k < a.rounds && a.looks > 1; k++) {
      const u32 took = timed(stop, read);
      if (took < found.again) found.again = took;
    }
    for (u32 k = 0; k < a.rounds && a.looks > 2; k++) {
      const u32 took = timed(stop, [&] { return held = arch::or_word(word, held); });
      if (took < found.change) found.change = took;
    }
    a.lines[i] = found;
  }
  return true;
}

// What the first lane of a unit's messenger does, and what it reports.
MK_FUNCTION void run_messenger(const Args& a, int me, u64 begin, u32* stop) {
  Unit& u = a.units[me];
  if (a.looks) {
    u.failed = !look_at_lines(a, me, stop, begin);
    return;
  }
  const i32 t = a.track_of[me];
  if (t >= 0) {
    u.job = pass_messages(a, (u32)me, a.tracks[t], a.turns + t * kTurnStride, begin);
    u.failed = u.job != a.tracks[t].count;
  }
  arch::set(stop, 1);
}

MK_FUNCTION void report(const Args& a, int me, u64 begin, u64 begin_ns, u64 steps) {
  Unit& u = a.units[me];
  u.place = arch::place();
  u.group = arch::group();
  u.begin_ns = begin_ns;
  u.ticks = arch::ticks() - begin;
  u.end_ns = arch::wall_clock();
  u.steps = steps;
}

}  // namespace topology

#if !defined(MK_PROBE_HOST)

MK_ENTRY(topology::arch::kWave + topology::kReaders * topology::kReaderLanes) void topology_probe(topology::Args a) {
  using namespace topology;
#if defined(__CUDA_ARCH__)
  __shared__ u32 stop;
  __shared__ u64 steps[kReaders];
#else
  static __attribute__((shared)) u32 stop;
  static __attribute__((shared)) u64 steps[kReaders];
#endif
  const int me = unit_number(a);
  if (me < 0) return;
  const int thread = arch::thread() - arch::kWave;  // of the readers
  const u64 begin = arch::ticks(), begin_ns = arch::wall_clock();
  if (arch::thread() == 0) arch::set(&stop, 0);
  arch::unit_sync();
  if (thread >= 0) {
    const u64 done = read_blocks(a, me, thread / kReaderLanes, thread % kReaderLanes, &stop, begin);
    if (thread % kReaderLanes == 0) steps[thread / kReaderLanes] = done;
  } else if (arch::thread() == 0) {
    run_messenger(a, me, begin, &stop);
  }
  arch::unit_sync();
  if (arch::thread() == 0) report(a, me, begin, begin_ns, steps[0] + steps[1]);
}

#if defined(__CUDA_ARCH__)
// Which SMs may form a cluster: all that are ever seen in one. Entries are {SM number, cluster number}.
#define MK_CLUSTERS(size)                                                                                          \
  extern "C" __global__ __cluster_dims__(size, 1, 1) void topology_clusters_##size(topology::u32* found) {         \
    topology::u32 cluster;                                                                                         \
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(cluster));                                                    \
    found[blockIdx.x * 2] = topology::arch::place();                                                               \
    found[blockIdx.x * 2 + 1] = cluster;                                                                           \
    const topology::u64 begin = topology::arch::ticks();                                                           \
    while (!topology::is_over(begin, 20000)) topology::arch::pause(); /* so that others must go to other SMs */    \
  }
MK_CLUSTERS(2)
MK_CLUSTERS(4)
MK_CLUSTERS(8)
#endif

#endif  // !MK_PROBE_HOST
#endif  // device code
#endif  // JAX_MONOKERNEL_TOPOLOGY_PROBE_H
