#include "gpu/probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gpu/build.h"
#include "gpu/failure.h"
#include "gpu/headers.h"

namespace monokernel::gpu {
namespace {

constexpr uint64_t kLeastBytes = uint64_t{16} << 20;
constexpr int kReaderThreads = topology::kReaders * topology::kReaderLanes;
constexpr double kGraceSeconds = 10;  // for the launch itself, and what else runs on the device

// Device memory that is given back.
class Memory {
 public:
  Memory(const Driver& api, size_t bytes) : api_(api) { api_.check(api_.device_alloc(&address, bytes), "allocate device memory"); }
  ~Memory() {
    if (address) api_.device_free(address);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* address = nullptr;

 private:
  const Driver& api_;
};

// One block of bytes for the device, put together on the host.
struct Blob {
  std::string bytes;
  template <typename T>
  size_t add(const std::vector<T>& values) {
    bytes.resize((bytes.size() + 255) / 256 * 256);
    const size_t at = bytes.size();
    bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
    return at;
  }
};

Failure wrong(const std::string& what) { return Failure(Code::kInvalid, "the probe was given " + what); }

}  // namespace

const char* probe_source() { return probe_headers().front().text; }

Probe::Probe(Vendor vendor, int ordinal, uint64_t memory_bytes, uint64_t address) : device_(Device::get(vendor, ordinal)) {
  if (address % topology::kStepBytes != 0) throw wrong("memory that does not begin at a page of 4096 bytes");
  device_.open();
  const Device::Current current(device_);
  const Driver& api = device_.api();
  const Architecture& a = device_.architecture();
  const std::shared_ptr<const Built> built =
      build(a, probe_source(), {.what = "the probe", .short_what = "probe", .ahead = "run the same command where a compiler is"});
  api.check(api.module_load(&module_, built->code.data()), "load the probe");
  function_ = function("topology_probe");
  int fixed_shared = 0, resident = 0;
  api.check(api.function_attribute(&fixed_shared, kStaticSharedBytes, function_), "describe the probe");
  shared_bytes_ = static_cast<unsigned>(a.shared_bytes - fixed_shared);
  if (api.set_function_attribute) {
    api.check(api.set_function_attribute(function_, kDynamicSharedBytes, static_cast<int>(shared_bytes_)), "give the probe its shared memory");
  }
  api.check(api.occupancy(&resident, function_, a.wave_size + kReaderThreads, shared_bytes_), "place the probe");
  if (resident < 1) throw Failure(Code::kExhausted, "the probe does not fit on a multiprocessor of " + device_.name());

  if (address != 0) {
    owns_memory_ = false;
    memory_ = reinterpret_cast<void*>(static_cast<uintptr_t>(address));
    memory_bytes_ = memory_bytes;
    return;
  }
  for (uint64_t bytes = memory_bytes / topology::kStepBytes * topology::kStepBytes;; bytes /= 2) {
    if (bytes < kLeastBytes) throw Failure(Code::kExhausted, "there is too little free memory on " + device_.name() + " to probe it");
    const int error = api.device_alloc(&memory_, bytes);
    memory_bytes_ = bytes;
    if (error == 0) break;
    if (error != kOutOfMemory) api.check(error, "allocate device memory");
  }
  api.check(api.set_async(memory_, 0, memory_bytes_, nullptr), "clear memory");
  api.check(api.stream_wait(nullptr), "clear memory");
}

Probe::~Probe() {
  if (!memory_ || lost_ || !owns_memory_) return;
  try {
    const Device::Current current(device_);
    device_.api().device_free(memory_);
  } catch (const Failure&) {  // the device is gone, and its memory with it
  }
}

void* Probe::function(const char* name) const {
  void* found = nullptr;
  device_.api().check(device_.api().module_function(&found, module_, name), "find the probe");
  return found;
}

void Probe::check(const Work& w) const {
  const size_t units = static_cast<size_t>(device_.multiprocessors());
  if (units > 0xffff) throw wrong("more units than it numbers");
  for (const size_t n : {w.track_of.size(), w.readings.size()}) {
    if (n != 0 && n != units) throw wrong("a table for " + std::to_string(n) + " units; there are " + std::to_string(units));
  }
  if (!w.unit_of.empty() && w.unit_of.size() != topology::kPlaces) throw wrong("a table of places that has the wrong size");
  if (w.batches < 1 || w.rounds < 1 || w.batches > 1000 || w.rounds > 100000 || w.warm_up > 100000) throw wrong("a wrong number of rounds");
  if (!(w.limit_s > 0 && w.limit_s <= 60)) throw wrong("a limit that is not between 0 and 60 seconds");
  if (w.block_shift < 7 || w.block_shift > 12) throw wrong("blocks that do not have 128 to 4096 bytes");
  std::vector<std::pair<uint32_t, uint32_t>> words;  // places, and the tracks that use them
  for (size_t t = 0; t < w.tracks.size(); t++) {
    const topology::Range& track = w.tracks[t];
    if (uint64_t{track.begin} + track.count > w.jobs.size()) throw wrong("a track of jobs that are not there");
    for (uint32_t j = track.begin; j < track.begin + track.count; j++) {
      const uint32_t asks = w.jobs[j].units & 0xffff, answers = w.jobs[j].units >> 16;
      if (asks >= units || answers >= units || asks == answers) throw wrong("a job for units that are not two of the device's");
      if (w.track_of.empty() || w.track_of[asks] != static_cast<int32_t>(t) || w.track_of[answers] != static_cast<int32_t>(t)) {
        throw wrong("a job for units of another track");
      }
      if ((uint64_t{w.jobs[j].place} + 1) * topology::kWordUnit > memory_bytes_) throw wrong("a job outside its memory");
      words.emplace_back(w.jobs[j].place, static_cast<uint32_t>(t));
    }
  }
  // Each pair would write over what the other one waits for.
  std::sort(words.begin(), words.end());
  for (size_t i = 1; i < words.size(); i++) {
    if (words[i].first == words[i - 1].first && words[i].second != words[i - 1].second) throw wrong("one word for two tracks");
  }
  for (const int32_t t : w.track_of) {
    if (t < -1 || t >= static_cast<int64_t>(w.tracks.size())) throw wrong("a track that is not there");
  }
  const uint64_t least = (topology::kReaders * topology::kStepBytes) >> w.block_shift;
  if (w.touch % sizeof(uint32_t) != 0) throw wrong("a place to touch that is no word's");
  if (w.looks > 3 || (w.looks > 0 && !w.jobs.empty())) throw wrong("looks of a kind that is not there, or jobs beside looks");
  for (const topology::Range& r : w.readings) {
    if ((w.looks == 0 && r.count > 0 && r.count < least) || uint64_t{r.begin} + r.count > w.blocks.size()) {
      throw wrong("a list of blocks that is not there, or of less than 8 KiB");
    }
  }
  for (const uint32_t block : w.blocks) {
    const uint64_t touched = (uint64_t{block} << w.block_shift) ^ w.touch;
    if ((uint64_t{block} + 1) << w.block_shift > memory_bytes_ || touched + sizeof(uint32_t) > memory_bytes_) throw wrong("a block outside its memory");
  }
}

void Probe::wait(double limit_s) {
  const Driver& api = device_.api();
  void* event = device_.exchange().event;
  api.check(api.event_record(event, nullptr), "record an event");
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(limit_s + kGraceSeconds);
  int state;
  while ((state = api.event_query(event)) == kNotReady) {
    if (std::chrono::steady_clock::now() > end) {
      lost_ = true;
      throw Failure(Code::kTimeout, "the probe did not end on " + device_.name() + ", and is left alone; something else may be using the device");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  api.check(state, "run the probe");
}

Probe::Found Probe::run(const Work& work) {
  check(work);
  if (lost_) throw Failure(Code::kTimeout, "an earlier launch of the probe did not end");
  const Device::Current current(device_);
  const Driver& api = device_.api();
  const auto units = static_cast<size_t>(device_.multiprocessors());
  Found found{std::vector<topology::Result>(work.jobs.size()), std::vector<topology::Line>(work.looks ? work.blocks.size() : 0),
              std::vector<topology::Unit>(units)};

  Blob blob;
  const size_t jobs = blob.add(work.jobs), tracks = blob.add(work.tracks), blocks = blob.add(work.blocks);
  const size_t track_of = blob.add(work.track_of.empty() ? std::vector<int32_t>(units, -1) : work.track_of);
  const size_t readings = blob.add(work.readings.empty() ? std::vector<topology::Range>(units) : work.readings);
  const size_t unit_of = blob.add(work.unit_of);
  const size_t turns = blob.add(std::vector<uint32_t>(work.tracks.size() * topology::kTurnStride));
  const size_t results = blob.add(found.results), lines = blob.add(found.lines), reports = blob.add(found.units);

  std::lock_guard lock(device_.launching());
  Memory memory(api, blob.bytes.size());
  char* base = static_cast<char*>(memory.address);
  topology::Args args{
      .data = static_cast<char*>(memory_),
      .unit_of = work.unit_of.empty() ? nullptr : reinterpret_cast<uint32_t*>(base + unit_of),
      .jobs = reinterpret_cast<topology::Job*>(base + jobs),
      .tracks = reinterpret_cast<topology::Range*>(base + tracks),
      .track_of = reinterpret_cast<int32_t*>(base + track_of),
      .turns = reinterpret_cast<uint32_t*>(base + turns),
      .results = reinterpret_cast<topology::Result*>(base + results),
      .blocks = reinterpret_cast<uint32_t*>(base + blocks),
      .readings = reinterpret_cast<topology::Range*>(base + readings),
      .lines = reinterpret_cast<topology::Line*>(base + lines),
      .units = reinterpret_cast<topology::Unit*>(base + reports),
      .unit_count = static_cast<uint32_t>(units),
      .steps = work.steps,
      .block_shift = work.block_shift,
      .batches = work.batches,
      .rounds = work.rounds,
      .warm_up = work.warm_up,
      .touch = work.touch,
      .looks = work.looks,
      .first_value = next_value_,
      .limit_ticks = device_.ticks(work.limit_s)};
  next_value_ += static_cast<uint32_t>(work.jobs.size()) * 2 * (work.warm_up + work.batches * work.rounds);
  void* parameters[] = {&args};
  try {
    api.check(api.copy_in_async(memory.address, blob.bytes.data(), blob.bytes.size(), nullptr), "give the probe its work");
    api.check(api.launch_cooperative(function_, static_cast<unsigned>(units), 1, 1,
                                     static_cast<unsigned>(device_.architecture().wave_size + kReaderThreads), 1, 1, shared_bytes_,
                                     nullptr, parameters),
              "launch the probe");
    wait(work.limit_s);
  } catch (const Failure&) {
    if (lost_) memory.address = nullptr;
    throw;
  }
  if (!found.results.empty()) {
    api.check(api.copy_out_async(found.results.data(), base + results, found.results.size() * sizeof(topology::Result), nullptr), "read the results");
  }
  if (!found.lines.empty()) {
    api.check(api.copy_out_async(found.lines.data(), base + lines, found.lines.size() * sizeof(topology::Line), nullptr), "read the results");
  }
  api.check(api.copy_out_async(found.units.data(), base + reports, units * sizeof(topology::Unit), nullptr), "read the results");
  api.check(api.stream_wait(nullptr), "read the results");
  return found;
}

std::vector<uint32_t> Probe::clusters(int size) {
  if (device_.api().vendor != Vendor::kCuda || device_.architecture().shared_bytes < 128 * 1024) return {};
  if (size != 2 && size != 4 && size != 8) throw wrong("a cluster size other than 2, 4 and 8");
  const Device::Current current(device_);
  const Driver& api = device_.api();
  void* entry = function(("topology_clusters_" + std::to_string(size)).c_str());
  const auto shared = static_cast<unsigned>(device_.architecture().shared_bytes);
  api.check(api.set_function_attribute(entry, kDynamicSharedBytes, static_cast<int>(shared)), "give the probe its shared memory");
  const unsigned blocks = static_cast<unsigned>(device_.multiprocessors() / size * size);
  if (blocks == 0) return {};
  std::vector<uint32_t> found(blocks * 2);
  std::lock_guard lock(device_.launching());
  Memory memory(api, found.size() * sizeof(uint32_t));
  void* address = memory.address;
  void* parameters[] = {&address};
  try {
    api.check(api.launch(entry, blocks, 1, 1, 32, 1, 1, shared, nullptr, parameters, nullptr), "launch the probe");
    wait(1);
  } catch (const Failure&) {
    if (lost_) memory.address = nullptr;
    throw;
  }
  api.check(api.copy_out_async(found.data(), address, found.size() * sizeof(uint32_t), nullptr), "read the results");
  api.check(api.stream_wait(nullptr), "read the results");
  return found;
}

}  // namespace monokernel::gpu
