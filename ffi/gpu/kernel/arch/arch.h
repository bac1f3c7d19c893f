// What the kernel asks of a machine. The only folder with vendor conditionals; each file below provides exactly this:
//
//   MK_DEVICE, MK_METHOD, MK_CONSTANT   function, member function and table qualifiers
//   MK_UNROLL, MK_NO_UNROLL     before a loop
//   MK_KERNEL(threads)          qualifier of the kernel entry
//   kWave                       lanes of a wave, 32 or 64
//   unit(), wave(), lane()      where this lane is; wave() and everything derived from it is uniform over the wave
//   shared()                    base of the unit's shared memory, 16-byte aligned
//   kRenew, arguments(args), fresh(v), fresh_truth(v)
//                               true where values that follow from a lane's place or from the kernel's argument would fill the
//                               registers if they were computed once for the whole launch; then unit(), wave(), lane(),
//                               arguments(args) and fresh(v) return what the compiler knows nothing of, so that such values are
//                               computed where they are needed; and fresh_truth(v), a bool that is the same in all lanes
//   unknown(v)                  v, of which the compiler then knows nothing, so that what follows from it is computed where it is
//                               needed
//   enter()                     once, by all lanes, before anything else
//   divide_registers<streams, registers>()   once by each wave, when nothing is shared any more by the code of stream waves
//                               (streams) and the others: a stream wave's lane keeps so many, the others get the rest. 0: as it is
//   unit_sync()                 barrier of all waves of the unit; orders shared and global memory inside the unit
//   group_sync<id, waves>()     barrier of `waves` whole waves (id 1 to 7)
//   wave_sync()                 barrier and shared-memory order inside a wave
//   open_gate()                 by all service waves: what they have written is there for the stream waves
//   pass_gate()                 by all stream waves: waits for that
//   hand_over()                 by all stream waves: what they have written is there for the service waves
//   take_over()                 by all service waves: waits for that. The four take turns in this order
//   hand_over_squares(), take_over_squares()   the same for sums of squares, between pass_gate and hand_over
//   MK_FEED_WAVE                defined where another wave, after stream and service waves, runs Ring::feed. It also calls
//                               make_meeting(), for builds of MK_RACECHECK
//   shuffle(v, lane), shuffle_xor(v, mask)   u32 and float; all lanes take part
//   sum_fours(v)                wave 64: float, the sum over the lanes of the same 16 whose numbers differ by multiples of 4, in all of them
//   sum_quarters(v)             wave 64: float, the sum over the lanes whose numbers differ by multiples of 16, in all of them
//   any(bool), wave_max(u32)    over the wave
//   load_word(p), load_words(p) relaxed, device scope: u32; four u32 (each atomic by itself, p 16-byte aligned)
//   store_word(p, v)            relaxed, device scope
//   store_half(p, v)            likewise, 16 bits
//   halves_not_zero(v)          whether none of a vector's 16-bit halves is 0
//   load_byte(p), store_byte(p, v)   likewise, of a word whose other bytes may be other units' or nobody's
//   shared_number(p)            an int of shared memory that all lanes read: of all lanes for the compiler too, which knows nothing else of it
//   With MK_NEAR or MK_PLACED only:
//   die()                       the number of the die where this lane is, from 0 to kDies - 1
//   add(p, v)                   device scope: adds to a u32 and returns what it was
//   With MK_NEAR only, for words that are written and read on one die, whose units share a cache:
//   load_near_word(p), load_near_words(p), store_near_word(p, v)   as those above, of this scope
//   look_again()                before such loads, that may otherwise give what they gave before
//   load_shared_data(p)         16 bytes of device memory that other units may have written before the last acquire
//   load_once(p)                16 bytes of read-only memory that is not needed again
//   prefetch(p, bytes)          brings device memory nearer, if the machine can; both are multiples of 16
//   pause(nanoseconds)          the wave sleeps for about as long, if the machine can
//   Wave 32 only, copies to shared memory, for which a barrier (u64 of shared memory) stands; all addresses and sizes are multiples of 16:
//   make_copy_barrier(barrier)  once, by one lane of the wave that uses it, before a wave_sync()
//   announce_copies(barrier, bytes)        by one lane: how much its next copies bring, together
//   copy_in(to, from, bytes, barrier)      by the same lane: requests one of them
//   await_copies(barrier, parity)          by the wave: until all that was announced is there; the first time parity is 0, then 1, ...
//   leave_to_copies()           what this lane has read and written of shared memory may be overwritten by copies requested after
//                               this, and the next barrier if by another lane
//   publish_to_copies()         likewise copies see what this lane has written to device memory
//   release(), acquire()        device-scope fences
//   load_host(p)                u32 of host memory, not cached
//   store_host(p, v)            u64 of host memory, which sees it soon
//   claim(p)                    true for the first caller of a launch (atomic compare and swap of 0 by 1)
//   shared_add(p, v)            adds to a u32 of shared memory and returns what it was; no order with other accesses
//   keep_order()                wave 64: what is before is issued before what comes after
//   ticks()                     u64 clock for timeouts and traces, monotonic on one unit
//   wall_clock()                u64 nanoseconds, the same on all units; for traces and mailboxes
//   as_u32(f), as_f32(u)        bit casts
//   fma(a, b, c), sqrt(x)       f32, correctly rounded (f64 overloads likewise)
//   fast_rsqrt(x), fast_divide(a, b), fast_exp2(x)   f32, within a few units in the last place; results of exp2 that are
//                               subnormal may be 0
//   pack_bf16(low, high)        two floats, rounded to nearest even, as one word
//   low_halves(a, b), high_halves(a, b)   wave 32: the low or high 16 bits of two words as one, a's as the lower ones
//   mma_16x8x16(c, a, b)        wave 32: float c[4], u32 a[4], u32 b[2] as PTX's mma.m16n8k16; template on bf16 or f16
//   mfma_4x4x4(c, a, b)         wave 64: float c[4], u32 a[2], u32 b[2] as v_mfma_f32_4x4x4 with 16 blocks; likewise, and
//                               on which of 1, 2 or 4 equal parts of the wave's lanes B comes from, for all the parts
//   Ring<slots, slot_atoms>     the stream of one wave, through slots in shared memory; the streams of a unit's waves are in step:
//     static constexpr int kSlotAtoms            atoms that are waited for and requested together
//     void start(ring, barriers, stream, bytes)  reads `bytes` at `stream`, again and again; bytes is a whole number of slots;
//                                                ring, barriers: shared memory of all waves' slots
//     void wait()                                until the current slot is there
//     template <int n> void read(int atom, Vec4 (&w)[n])   atoms `atom` to atom + n - 1 of the slot, 16 bytes a lane
//     template <int n> void done(int atom)       these atoms will not be read again
//     u32 next()                                 goes to the next slot; returns what give_back needs of the one before
//     template <int n> void give_back(const u32 (&freed)[n])   these slots may be filled again; once what was read of them is used
//     void drain()                               waits for all that was requested; nothing is requested after
//   A Ring in registers (MK_REGISTER_RING) is no template, has kAtoms instead of slots, and needs no give_back; read and done
//   take the index of an atom of the ring, a constant after unrolling; kReservedShared bytes at the end of shared memory are the machine's own. With
//   MK_PLACED it has
//     void start(streams, places, last, bytes)   reads a stream whose pages lie where `places` says, in kPlaceBytes from `streams`, and
//                                                never further than `last`; bytes is a whole number of slots, and they of pages
//   Vec4                        struct {u32 x, y, z, w;}, 16-byte aligned
#pragma once

#include "args.h"

#if defined(MK_HOST)
#include "arch/host.h"
#elif defined(__CUDACC_RTC__) || defined(__CUDACC__)
#include "arch/cuda.h"
#else
#include "arch/amd.h"
#endif
