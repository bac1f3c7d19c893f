// The GPU kernel's mathematics and sampler as a library for test_gpu_math.py, which compiles it: the service lanes of
// one unit are fibers of one thread, which take turns wherever they meet.
//
// -D: MK_WAVE_SIZE, MK_SERVICE_WAVES. The vocabulary's size is a variable here.
static int vocab_size;
#define MK_HOST
#define MK_VOCAB_SIZE vocab_size
#define MK_UNITS 1
#define MK_WAVES 0
#define MK_SHARED_BYTES (16 * 1024)

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "math/elementary.h"
#include "math/threefry.h"
#include "native/gpu_host/fiber.h"
#include "phases/filters.h"
#include "phases/sampling.h"

namespace mk::host {
namespace {

constexpr int kLanes = MK_SERVICE_WAVES * MK_WAVE_SIZE;

struct Lane {
  Place place;  // first, as `current` points to it
  Context context;
  int next;  // whose turn is after this lane's
};

// Where lanes wait for each other.
struct Meeting {
  int arrived = 0;
  u32 phase = 0;
};

struct Team {
  Lane lanes[kLanes];
  Meeting waves[MK_SERVICE_WAVES], all;
  u32 values[MK_SERVICE_WAVES][2][MK_WAVE_SIZE];  // of shuffles, by the parity of the phase
  alignas(16) char shared[MK_SHARED_BYTES];
  Context main;
  Stacks stacks{kLanes};
  std::mt19937 random;
  int left;          // lanes that have not ended
  int idle;          // turns since anything happened
  void (*work)(int);  // of a lane

  Lane& here() { return *reinterpret_cast<Lane*>(current); }

  void pass() {
    if (++idle > 4 * kLanes) fail(mk::host::here(), "the lanes wait for each other");
    Lane& from = here();
    Lane& to = lanes[from.next];
    current = &to.place;
    if (&to != &from) switch_context(from.context, to.context);
  }

  void meet(Meeting& meeting, int size) {
    const u32 phase = meeting.phase;
    idle = 0;
    if (++meeting.arrived == size) {
      meeting.arrived = 0;
      meeting.phase++;
      return;
    }
    while (meeting.phase == phase) pass();
  }

  void run(void (*work_of_lane)(int), u32 seed);
};

Team team;

void lane_main() {
  team.work(static_cast<int>(&team.here() - team.lanes));
  Lane& from = team.here();
  team.idle = 0;
  if (--team.left == 0) {
    switch_context(from.context, team.main);
  }
  for (;;) team.pass();
}

// Lanes take turns in an order that depends on the seed.
void Team::run(void (*work_of_lane)(int), u32 seed) {
  work = work_of_lane;
  left = kLanes;
  idle = 0;
  random.seed(seed);
  all = {};
  std::fill(std::begin(waves), std::end(waves), Meeting{});
  std::memset(shared, 0xa5, sizeof shared);
  int order[kLanes];
  std::iota(order, order + kLanes, 0);
  std::shuffle(order, order + kLanes, random);
  for (int i = 0; i < kLanes; i++) {
    Lane& lane = lanes[order[i]];
    lane.place = {0, static_cast<u32>(order[i] / MK_WAVE_SIZE), static_cast<u32>(order[i] % MK_WAVE_SIZE)};
    lane.next = order[(i + 1) % kLanes];
    stacks.start(lane.context, order[i], lane_main);
  }
  current = &lanes[order[0]].place;
  switch_context(main, lanes[order[0]].context);
}

}  // namespace

Place* current;

void fail(Where where, const char* format, ...) {
  std::fprintf(stderr, "%s:%d: ", where.file, where.line);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputc('\n', stderr);
  std::abort();
}

void wave_sync(Where) { team.meet(team.waves[current->wave], MK_WAVE_SIZE); }
void barrier(u32, u32, Where) { team.meet(team.all, kLanes); }

u32 shuffle(u32 value, u32 from, Where) {
  const u32 wave = current->wave;
  Meeting& meeting = team.waves[wave];
  u32* values = team.values[wave][meeting.phase % 2];
  values[current->lane] = value;
  team.meet(meeting, MK_WAVE_SIZE);
  return values[from];
}

u32 load_word(const u32* p, Where) { return *p; }
Vec4 load_data(const void* p, bool, Where) { return *static_cast<const Vec4*>(p); }

u32 shared_add(u32* p, u32 v, Where) {
  team.idle = 0;
  if (team.random() % 4 == 0) team.pass();
  const u32 old = *p;
  *p += v;
  return old;
}

}  // namespace mk::host

namespace {

using namespace mk;
constexpr int kLanes = host::kLanes;

template <typename F>
void map(const float* x, float* y, i64 n, F f) {
  for (i64 i = 0; i < n; i++) y[i] = f(x[i]);
}

// One row, as phases/head.h does it, for a machine of one unit.
struct Request {
  const Args* args;
  int row;
  const float* logits;
  float* adjusted;  // [vocab] and room for a whole vector
  i32 token;
  float log_prob;
} request;

void choose(int lane) {
  const Args& a = *request.args;
  const RowOptions options = row_options(a, request.row, a.position[request.row]);
  Candidate best = no_candidate();
  for (int token = lane; token < vocab_size; token += kLanes) {
    const float raw = request.logits[token];
    const float z = adjust(options, a, request.row, token, raw);
    offer(best, options, token, raw, z);
    request.adjusted[token] = z;
  }
  for (int mask = 1; mask < arch::kWave; mask *= 2) merge_lanes(best, mask);
  auto* packed = reinterpret_cast<u32(*)[kPackedCandidate]>(host::team.shared);
  if (arch::lane() == arch::kWave - 1) pack(best, packed[arch::wave()]);
  arch::group_sync<1, MK_SERVICE_WAVES>();
  best = no_candidate();
  for (int w = 0; w < MK_SERVICE_WAVES; w++) merge(best, unpack(packed[w]));
  arch::group_sync<1, MK_SERVICE_WAVES>();
  i32 token = best.best.token;
  if (options.filtered) {
    token = sample_filtered(options, best, request.adjusted, host::team.shared, lane);
    best.raw = request.logits[token];
  }
  if (lane == 0) request.token = token;
  arch::group_sync<1, MK_SERVICE_WAVES>();
  if (token != request.token) host::fail(host::here(), "the lanes do not agree");
  if (lane == 0) request.log_prob = options.wants_log_prob ? log_prob(best.raw, best.top, best.sum) : 0.0f;
}

struct Filtered {
  RowOptions options;
  Candidate best;
  const float* adjusted;
  i32 token;
} filtered;

void choose_filtered(int lane) {
  const i32 token = sample_filtered(filtered.options, filtered.best, filtered.adjusted, host::team.shared, lane);
  if (lane == 0) filtered.token = token;
}

}  // namespace

extern "C" {

void math_exp(const float* x, float* y, i64 n) { map(x, y, n, exp_); }
void math_log(const float* x, float* y, i64 n) { map(x, y, n, log_); }
void math_tanh(const float* x, float* y, i64 n) { map(x, y, n, tanh_); }
void math_erf(const float* x, float* y, i64 n) { map(x, y, n, erf_); }
void math_sin(const float* x, float* y, i64 n) {
  map(x, y, n, [](float angle) {
    float sin, cos;
    sin_cos(angle, &sin, &cos);
    return sin;
  });
}
void math_cos(const float* x, float* y, i64 n) {
  map(x, y, n, [](float angle) {
    float sin, cos;
    sin_cos(angle, &sin, &cos);
    return cos;
  });
}
// How far the bound of the noise is above it.
void math_noise_slack(const u32* bits, float* y, i64 n) {
  for (i64 i = 0; i < n; i++) y[i] = noise_bound(bits[i]) - gumbel_noise(bits[i]);
}

void sample_bits(const u32* key, i32 position, i64 n, u32* out) {
  const Key step_key = fold_in({key[0], key[1]}, (u32)position);
  for (i64 i = 0; i < n; i++) out[i] = random_bits(step_key, (u32)i);
}

bool eos(const i32* ids, i32 count, i32 row, i32 token) {
  Args a{};
  a.eos_token_id = ids;
  a.eos_count = count;
  bool found = false;
  for (int lane = 0; lane < arch::kWave; lane++) found |= is_eos(a, row, token, first_eos(a, row, lane), lane);
  return found;
}

// sample_filtered with a candidate that need not be that of the logits, which are 16-byte aligned whole vectors.
i32 sample_anything(const float* adjusted, i32 vocab, float best, float mass, i32 top_k, float top_p, float min_p) {
  vocab_size = vocab;
  const float temperature = 1.0f, off = 0.0f;
  const u32 key[2] = {1, 2};
  Args a{};
  a.temperature = a.repetition_penalty = &temperature;
  a.presence_penalty = &off;
  a.top_k = &top_k;
  a.top_p = &top_p;
  a.min_p = &min_p;
  a.key_data = key;
  filtered = {row_options(a, 0, 0), no_candidate(), adjusted, -1};
  filtered.best.best.score = best;
  filtered.best.mass = mass;
  host::team.run(choose_filtered, 0);
  return filtered.token;
}

// Shapes as in Args; logits [batch][vocab]. logit_bias and log_probs may be null. Lanes take turns as `seed` says.
void sample_rows(const float* logits, const u8* seen, const u32* key_data, i32* position, const float* temperature,
                 const i32* top_k, const float* top_p, const float* min_p, const float* repetition_penalty,
                 const float* presence_penalty, const float* logit_bias, i32* tokens, float* log_probs, i32 batch,
                 i32 vocab, u32 seed) {
  vocab_size = vocab;
  Args a{};
  a.temperature = temperature;
  a.top_k = top_k;
  a.top_p = top_p;
  a.min_p = min_p;
  a.repetition_penalty = repetition_penalty;
  a.presence_penalty = presence_penalty;
  a.logit_bias = logit_bias;
  a.key_data = key_data;
  a.position = position;
  a.seen = const_cast<u8*>(seen);
  a.log_probs = log_probs;
  auto* adjusted = static_cast<float*>(std::aligned_alloc(16, ((size_t)vocab + 3) / 4 * 16));
  for (i32 row = 0; row < batch; row++) {
    request = {&a, row, logits + (i64)row * vocab, adjusted, 0, 0.0f};
    std::fill(adjusted, adjusted + (vocab + 3) / 4 * 4, arch::as_f32(0x7fc00000u));
    host::team.run(choose, seed + (u32)row);
    tokens[row] = request.token;
    if (log_probs) log_probs[row] = request.log_prob;
  }
  std::free(adjusted);
}

}  // extern "C"
