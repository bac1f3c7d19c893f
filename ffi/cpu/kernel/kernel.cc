// The decode loop of one thread, compiled once for each instruction set (MONOKERNEL_ISA names the build).
//
// A token is a fixed sequence of phases with a hand-off after each (docs/cpu.md):
//   p1_norm_qkv, p2_attend, p3_project_out, p4_gate_up, p5_down for every layer, then p6_head and p7_sample.
// Every thread keeps its own copy of the residual stream and repeats the norms: that is cheaper than another hand-off.

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/job.h"

#define MONOKERNEL_STRING(x) #x
#define MONOKERNEL_NAME(x) MONOKERNEL_STRING(x)

namespace monokernel::cpu::MONOKERNEL_ISA {
namespace {

// In this order: each uses what stands before it.
// clang-format off
#include "cpu/kernel/vec.h"
#include "cpu/kernel/gemv.h"
#include "cpu/kernel/rows.h"
#include "cpu/kernel/attention.h"
// clang-format on

FORCE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
FORCE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A thread's private memory: offsets in floats, every part on its own cache line.
struct Layout {
  int64_t residual;     // [batch, hidden]
  int64_t row;          // [widest] one row before rounding
  int64_t activations;  // [batch, widest] rounded, as multiply_tile reads them
  int64_t angles;       // [batch, ropes, rotary_dim]
  int64_t attention;    // scratch of attend()
  int64_t total;

  explicit Layout(const Job& job) {
    const Program& p = job.program;
    const int64_t qkv = p.q_size() + 2 * p.kv_size();
    const int64_t widest = round_up(larger(larger(p.hidden_size, p.intermediate_size), qkv), 16);
    int64_t at = 0;
    auto place = [&at](int64_t floats) {
      int64_t start = at;
      at += round_up(floats, 16);
      return start;
    };
    residual = place(job.batch * p.hidden_size);
    row = place(widest);
    activations = place(job.batch * widest);
    angles = place(job.batch * p.num_ropes * p.rotary_dim);
    attention = place((p.num_heads / p.num_kv_heads + 1) * p.head_dim + kHeads * kScoreStride);
    total = place(0);
  }
};

template <typename W>
class Thread {
 public:
  Thread(Job& job, int thread)
      : job_(job), p_(job.program), thread_(thread), layout_(job), memory_(job.scratch + thread * job.scratch_floats) {}

  void run() {
    for (int64_t token = 0;; token++) {
      find_live_rows();
      // Thread 0 looked at the cancel flag before the last hand-off, so that all threads agree.
      if (live_ == 0 || job_.cancelled) return;
      start_token();
      for (int64_t layer = 0; layer < p_.num_layers; layer++) run_layer(layer);
      p6_head();
      hand_off(nullptr, 0);
      p7_sample();
      hand_off(stream(thread_), kIdlePrefetchBytes);
    }
  }

 private:
  // While waiting, a thread draws the next part of its stream towards its caches. Half of a small L2.
  static constexpr int64_t kIdlePrefetchBytes = 128 * 1024;
  // Tens of microseconds: longer than threads differ in a phase, shorter than the time slice of whoever took a core.
  static constexpr int kSpins = 2000;

  // Every thread finds the same rows: nobody writes these arrays until the next sampling, many hand-offs away.
  void find_live_rows() {
    live_ = 0;
    for (int64_t b = 0; b < job_.batch; b++) {
      if (job_.status[b] != kRunning || job_.position[b] >= job_.capacity) continue;
      if (job_.lengths[b] >= job_.max_new_tokens || job_.lengths[b] >= job_.sampling.max_new_tokens[b]) continue;
      rows_[live_++] = b;
    }
  }

  const W* stream(int64_t unit) const { return (const W*)job_.streams + unit * p_.unit_elems; }

  // Waits for all threads. Meanwhile requests the next `bytes` at `next`: the weights that follow are known long before the
  // activations that they will be multiplied with.
  void hand_off(const W* next, int64_t bytes) {
    if (job_.threads == 1) return;
    const uint32_t* epoch = job_.barrier.epoch();
    const uint32_t ticket = job_.barrier.arrive();
    int64_t fetched = 0;
    for (int spins = 0; spins < kSpins; spins++) {
      if (__atomic_load_n(epoch, __ATOMIC_ACQUIRE) != ticket) return;
      if (fetched < bytes) {
        __builtin_prefetch((const char*)next + fetched, 0, 2);
        fetched += 64;
      } else {
        pause();
      }
    }
    job_.barrier.sleep(ticket);
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  float* residual(int64_t i) { return memory_ + layout_.residual + i * p_.hidden_size; }
  float* row() { return memory_ + layout_.row; }

  // Rounds row() as input i of the next multiplication by a matrix of `count` columns.
  void use_row(int64_t i, const float* values, int64_t count) {
    const int64_t cols = round_up(count, sizeof(W) == 2 && __is_same(W, Bf16) ? 2 : 1);
    cols_ = cols;
    float* out = memory_ + layout_.activations + i * round_up(Activations<W>::floats(cols), 16);
    pack_activations<W>(values, count, cols, out);
    inputs_[i] = out;
  }

  void start_token() {
    const int64_t hidden = p_.hidden_size;
    for (int64_t i = 0; i < live_; i++) {
      const int64_t token = job_.last_token[rows_[i]];
      float* x = residual(i);
      if (job_.embedding) {
        const W* e = (const W*)job_.embedding + token * hidden;
        for (int64_t k = 0; k < hidden; k++) x[k] = to_float(e[k]) * p_.embedding_multiplier;
      } else {
        embed_from_head(token, x);
      }
      if (p_.num_ropes > 0) fill_angles(job_, job_.position[rows_[i]], angles(i, 0));
    }
  }

  float* angles(int64_t i, int64_t rope) {
    return memory_ + layout_.angles + (i * p_.num_ropes + rope) * p_.rotary_dim;
  }

  // A tied embedding has no copy of its own: row `token` is one lane of a tile of the head.
  void embed_from_head(int64_t token, float* x) {
    constexpr int64_t kGroup = __is_same(W, Bf16) ? 2 : 1;
    const int64_t tile = token / 16, lane = token % 16;
    int64_t unit = 0;
    while (tile >= p_.tile(kHead, unit).begin + p_.tile(kHead, unit).count) unit++;
    const TileRow& t = p_.tile(kHead, unit);
    const int64_t cols = round_up(p_.hidden_size, kGroup);
    const W* w = stream(unit) + t.offset + (tile - t.begin) * 16 * cols;
    for (int64_t k = 0; k < p_.hidden_size; k++) {
      x[k] = to_float(w[(k / kGroup) * 16 * kGroup + lane * kGroup + k % kGroup]) * p_.embedding_multiplier;
    }
  }

  // Calls use(first row, products [live][16]) for each of this thread's tiles of a phase.
  template <typename Use>
  void multiply(Phase phase, int64_t layer, int64_t step, Use use) {
    float out[2][kMaxBatch][16];
    for (int64_t unit = thread_; unit < p_.units; unit += job_.threads) {
      const TileRow& t = p_.tile(phase, unit);
      const W* w = stream(unit) + t.offset + (phase == kHead ? 0 : layer * p_.layer_elems);
      for (int64_t i = 0; i < t.count; i += step) {
        for (int64_t s = 0; s < step; s++, w += 16 * cols_) multiply_tile<W>(w, cols_, inputs_, live_, out[s]);
        use((t.begin + i) / step * 16, out);
      }
    }
  }

  // Writes a phase's products and bias to an exchange buffer [batch, size].
  void multiply_to(Phase phase, int64_t layer, const float* bias, int64_t size, float* to) {
    multiply(phase, layer, 1, [&](int64_t first, const float (*out)[kMaxBatch][16]) {
      const int64_t n = size - first < 16 ? size - first : 16;
      for (int64_t i = 0; i < live_; i++) {
        float* y = to + rows_[i] * size + first;
        for (int64_t r = 0; r < n; r++) y[r] = out[0][i][r] + (bias ? bias[first + r] : 0.0f);
      }
    });
  }

  const float* constants(int64_t layer) const {
    return job_.constants + p_.layer_constants_offset + layer * p_.layer_constants;
  }
  static const float* part(const float* constants, int64_t offset) { return offset < 0 ? nullptr : constants + offset; }

  const W* weights_at(Phase phase, int64_t layer) const {
    return stream(thread_) + p_.tile(phase, thread_).offset + (phase == kHead ? 0 : layer * p_.layer_elems);
  }
  void hand_off_before(Phase phase, int64_t layer) { hand_off(weights_at(phase, layer), kIdlePrefetchBytes); }

  void run_layer(int64_t layer) {
    const float* c = constants(layer);
    p1_norm_qkv(layer, c);
    hand_off_before(kO, layer);
    p2_attend(layer, c);
    hand_off_before(kO, layer);
    p3_project_out(layer, c);
    hand_off_before(kGateUp, layer);
    add_projected(part(c, p_.attn_post_norm));
    p4_gate_up(layer, c);
    hand_off_before(kDown, layer);
    p5_down(layer, c);
    if (layer + 1 < p_.num_layers) {
      hand_off_before(kQkv, layer + 1);
    } else {
      hand_off_before(kHead, 0);
    }
    add_projected(part(c, p_.mlp_post_norm));
  }

  void norm_inputs(const float* weight) {
    for (int64_t i = 0; i < live_; i++) {
      const float* x = residual(i);
      if (weight) {
        rms_norm(p_, x, weight, p_.hidden_size, row());
        x = row();
      }
      use_row(i, x, p_.hidden_size);
    }
  }

  void p1_norm_qkv(int64_t layer, const float* c) {
    norm_inputs(part(c, p_.attn_norm));
    multiply_to(kQkv, layer, part(c, p_.q_bias), p_.q_size() + 2 * p_.kv_size(), job_.shared.qkv);
  }

  void p2_attend(int64_t layer, const float* c) {
    const int64_t width = p_.q_size() + 2 * p_.kv_size();
    int64_t tasks = 0;
    for (int64_t i = 0; i < live_; i++) tasks += p_.num_kv_heads * Context(job_, layer, rows_[i]).splits;
    const int64_t begin = tasks * thread_ / job_.threads, end = tasks * (thread_ + 1) / job_.threads;
    const int64_t rope = p_.layers[layer].rope;
    int64_t task = 0;  // first one of request i
    for (int64_t i = 0; i < live_ && task < end; i++) {
      const Context context(job_, layer, rows_[i]);
      const int64_t next = task + p_.num_kv_heads * context.splits;
      const float* qkv = job_.shared.qkv + rows_[i] * width;
      if (p_.qk_norm == 2 && next > begin) {
        rms_norm(p_, qkv, c + p_.q_norm, p_.q_size(), row());
        rms_norm(p_, qkv + p_.q_size(), c + p_.k_norm, p_.kv_size(), row() + p_.q_size());
        __builtin_memcpy(row() + p_.q_size() + p_.kv_size(), qkv + p_.q_size() + p_.kv_size(), (size_t)p_.kv_size() * 4);
        qkv = row();
      }
      // Parts of one head's context are neighbours, so a thread's share of a long context is one run of memory.
      for (int64_t t = larger(begin, task); t < next && t < end; t++) {
        attend_(job_, context, layer, rows_[i], (t - task) / context.splits, (t - task) % context.splits, qkv, c,
                   rope < 0 ? nullptr : angles(i, rope), memory_ + layout_.attention);
      }
      task = next;
    }
  }

  void p3_project_out(int64_t layer, const float* c) {
    for (int64_t i = 0; i < live_; i++) {
      combine_splits(job_, Context(job_, layer, rows_[i]), rows_[i], row());
      use_row(i, row(), p_.q_size());
    }
    multiply_to(kO, layer, part(c, p_.o_bias), p_.hidden_size, job_.shared.projected);
  }

  // residual += residual_multiplier * (post-norm of) the last projection.
  void add_projected(const float* post_norm) {
    for (int64_t i = 0; i < live_; i++) {
      const float* y = job_.shared.projected + rows_[i] * p_.hidden_size;
      if (post_norm) {
        rms_norm(p_, y, post_norm, p_.hidden_size, row());
        y = row();
      }
      float* x = residual(i);
      for (int64_t k = 0; k < p_.hidden_size; k++) x[k] += p_.residual_multiplier * y[k];
    }
  }

  void p4_gate_up(int64_t layer, const float* c) {
    norm_inputs(part(c, p_.mlp_norm));
    const bool gated = p_.gated != 0;
    // Without a gate the only tile is that of `up`, and the activation is applied to it.
    const float *gate_bias = part(c, gated ? p_.gate_bias : p_.up_bias), *up_bias = part(c, p_.up_bias);
    const int64_t size = p_.intermediate_size;
    multiply(kGateUp, layer, gated ? 2 : 1, [&](int64_t first, const float (*out)[kMaxBatch][16]) {
      const int64_t n = size - first < 16 ? size - first : 16;
      for (int64_t i = 0; i < live_; i++) {
        float gate[16], up[16];
        __builtin_memcpy(gate, out[0][i], sizeof(gate));
        if (gate_bias) for (int64_t r = 0; r < n; r++) gate[r] += gate_bias[first + r];
        for (int64_t r = 0; r < 16; r += LANES) store(gate + r, vactivate(p_.activation, load(gate + r)));
        if (gated) {
          __builtin_memcpy(up, out[1][i], sizeof(up));
          if (up_bias) for (int64_t r = 0; r < n; r++) up[r] += up_bias[first + r];
          for (int64_t r = 0; r < 16; r++) gate[r] *= up[r];
        }
        __builtin_memcpy(job_.shared.inner + rows_[i] * size + first, gate, (size_t)n * 4);
      }
    });
  }

  void p5_down(int64_t layer, const float* c) {
    for (int64_t i = 0; i < live_; i++) {
      use_row(i, job_.shared.inner + rows_[i] * p_.intermediate_size, p_.intermediate_size);
    }
    multiply_to(kDown, layer, part(c, p_.down_bias), p_.hidden_size, job_.shared.projected);
  }

  void p6_head() {
    norm_inputs(job_.constants + p_.final_norm);
    const int64_t size = p_.vocab_size;
    multiply(kHead, 0, 1, [&](int64_t first, const float (*out)[kMaxBatch][16]) {
      const int64_t n = size - first < 16 ? size - first : 16;
      for (int64_t i = 0; i < live_; i++) {
        float y[16];
        for (int64_t r = 0; r < 16; r += LANES) {
          Vf v = load(out[0][i] + r) * p_.logit_multiplier;
          if (p_.logit_softcap > 0.0f) v = p_.logit_softcap * vtanh(v / p_.logit_softcap);
          store(y + r, v);
        }
        __builtin_memcpy(job_.shared.logits + rows_[i] * size + first, y, (size_t)n * 4);
      }
    });
  }

  void p7_sample() {
    for (int64_t i = thread_; i < live_; i += job_.threads) sample_request(job_, rows_[i]);
    if (thread_ != 0) return;
    job_.cancelled = __atomic_load_n(job_.cancel_epoch, __ATOMIC_RELAXED) != job_.cancel_at_start ||
                     (job_.stop && __atomic_load_n(job_.stop, __ATOMIC_RELAXED) != 0);
  }

  Job& job_;
  const Program p_;  // a copy: the compiler may keep it in registers across stores
  const int thread_;
  // The only phase that knows the cache's dtype, so that not all phases are compiled for every pair of dtypes.
  decltype(&attend<float>) const attend_ = p_.kv_dtype == kBF16  ? attend<Bf16>
                                           : p_.kv_dtype == kF16 ? attend<F16>
                                                                 : attend<float>;
  const Layout layout_;
  float* const memory_;
  int64_t live_ = 0;
  int64_t rows_[kMaxBatch];
  const float* inputs_[kMaxBatch];
  int64_t cols_ = 0;  // of the inputs
};

void run(Job& job, int thread) {
  switch (job.program.weight_dtype) {
    case kBF16:
      return Thread<Bf16>(job, thread).run();
    case kF16:
      return Thread<F16>(job, thread).run();
    default:
      return Thread<float>(job, thread).run();
  }
}

int64_t scratch_floats(const Job& job) { return Layout(job).total; }

// What the memory can deliver: loads, and one addition for each.
uint64_t read(const void* from, int64_t bytes) {
  constexpr int kVectors = (int)kReadBytes / (int)sizeof(Vu);
  constexpr int kSums = kVectors < 8 ? kVectors : 8;
  Vu sums[kSums] = {};
  const auto* words = (const uint32_t*)from;
  for (int64_t i = 0; i + kReadBytes <= bytes; i += kReadBytes, words += kReadBytes / 4) {
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; v++) sums[v % kSums] += load_as<Vu>(words + v * LANES);
  }
  uint64_t total = 0;
  for (int v = 0; v < kSums; v++) {
    for (int i = 0; i < LANES; i++) total += sums[v][i];
  }
  return total;
}

}  // namespace

extern const Kernel kernel;
constexpr SampleIsa kSampleIsa = LANES == 16  ? SampleIsa::kAvx512
                                 : LANES == 8 ? SampleIsa::kAvx2
                                              : SampleIsa::kBase;
const Kernel kernel{MONOKERNEL_NAME(MONOKERNEL_ISA), kSampleIsa, run, scratch_floats, read};

}  // namespace monokernel::cpu::MONOKERNEL_ISA
