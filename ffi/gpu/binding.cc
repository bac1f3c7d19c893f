#include "gpu/binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/build.h"
#include "gpu/compiler.h"
#include "gpu/device.h"
#include "gpu/driver.h"
#include "gpu/failure.h"
#include "gpu/handler.h"
#include "gpu/headers.h"
#include "gpu/probe.h"
#include "gpu/request.h"
#include "gpu/settings.h"

namespace py = pybind11;

namespace monokernel::gpu {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // arrays of another dtype are refused, not converted

constexpr const char* kTarget = "jax_monokernel_decode";

Attributes attributes(const Array<int64_t>& ints, const Array<float>& floats, const Array<int64_t>& layers,
                      const Array<double>& ropes, const Array<int64_t>& tiles) {
  const auto span = [](const auto& array) { return std::span(array.data(), static_cast<size_t>(array.size())); };
  return {span(ints), span(floats), span(layers), span(ropes), span(tiles)};
}

bool placed_if(bool placed, const Request& request) {
  if (placed && pages(request.program) == 0) throw std::invalid_argument("pages of weights can be placed for rocm, by a plan with waves of 64 lanes");
  return placed;
}

Vendor vendor_of(const std::string& platform) {
  if (platform == "cuda") return Vendor::kCuda;
  if (platform == "rocm") return Vendor::kRocm;
  throw std::invalid_argument("platform is \"" + platform + "\"; expected cuda or rocm");
}

py::dict handlers(XLA_FFI_Handler* (*handler)(Vendor)) {
  py::dict platforms;
  for (const auto& [name, vendor] : {std::pair("CUDA", Vendor::kCuda), std::pair("ROCM", Vendor::kRocm)}) {
    py::dict targets;
    targets[kTarget] = py::capsule(reinterpret_cast<void*>(handler(vendor)));
    platforms[name] = targets;
  }
  return platforms;
}

// The devices that the kernel runs on. If there are others only, why it does not run on the first of them is thrown.
py::list devices(const std::string& platform) {
  const Vendor vendor = vendor_of(platform);
  int count = 0;
  driver(vendor).check(driver(vendor).device_count(&count), "count its devices");
  py::list all;
  std::exception_ptr problem;
  for (int i = 0; i < count; i++) {
    const Device* found = nullptr;
    try {
      found = &Device::get(vendor, i);
    } catch (const Failure& failure) {
      if (failure.code != Code::kUnsupported) throw;
      if (!problem) problem = std::current_exception();
      continue;
    }
    const Device& device = *found;
    py::dict d;
    d["ordinal"] = i;
    d["name"] = device.name();
    d["arch"] = device.architecture().name;
    d["units"] = device.multiprocessors();
    d["clock_khz"] = device.clock_khz();
    d["driver_version"] = device.api().version;
    d["bus"] = device.bus();
    d["uuid"] = device.uuid();
    all.append(d);
  }
  if (all.empty() && problem) std::rethrow_exception(problem);
  return all;
}

// What the driver says of each device, whether the kernel runs on it or not. For people: nothing else needs all of it.
py::list describe(const std::string& platform) {
  const Vendor vendor = vendor_of(platform);
  const Driver& api = driver(vendor);
  int count = 0;
  api.check(api.device_count(&count), "count its devices");
  py::list all;
  for (int i = 0; i < count; i++) {
    int handle = 0;
    size_t memory = 0;
    char name[256] = {}, bus[64] = {};
    api.check(api.device_get(&handle, i), "find the device");
    api.check(api.device_name(name, sizeof(name) - 1, handle), "name the device");
    api.check(api.device_memory(&memory, handle), "tell the device's memory");
    api.check(api.device_bus(bus, sizeof(bus) - 1, handle), "tell where the device is");
    const auto attribute = [&](int number) {
      int value = 0;
      api.check(api.device_attribute(&value, number, handle), "describe the device");
      return value;
    };
    std::vector<int> peers;
    for (int j = 0; j < count; j++) {
      int other = 0, can = 0;
      api.check(api.device_get(&other, j), "find the device");
      if (j != i) api.check(api.can_access_peer(&can, handle, other), "tell which devices reach each other");
      if (can) peers.push_back(j);
    }
    py::dict d;
    d["name"] = name;
    d["bus"] = bus;
    d["memory_bytes"] = memory;
    d["units"] = attribute(api.attributes.multiprocessors);
    d["shared_bytes"] = attribute(api.attributes.shared_limit_bytes);
    d["peers"] = peers;
    try {
      d["arch"] = Device::get(vendor, i).architecture().name;
    } catch (const Failure& failure) {
      d["problem"] = failure.what();
    }
    all.append(d);
  }
  return all;
}

// An array of structs, from and to arrays of their 32-bit fields.
template <typename T>
std::vector<T> structs(const Array<uint32_t>& array) {
  constexpr py::ssize_t kFields = sizeof(T) / sizeof(uint32_t);
  if (array.size() % kFields != 0) throw std::invalid_argument("expected " + std::to_string(kFields) + " numbers of 32 bits for each");
  const T* data = reinterpret_cast<const T*>(array.data());
  return {data, data + array.size() / kFields};
}

template <typename T>
py::array_t<uint32_t> fields(const std::vector<T>& values) {
  constexpr py::ssize_t kFields = sizeof(T) / sizeof(uint32_t);
  py::array_t<uint32_t> array({static_cast<py::ssize_t>(values.size()), kFields});
  if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(T));
  return array;
}

void bind_probe(py::module_& m) {
  m.def("gpu_probe_source", &probe_source, "The device code of GpuProbe.");
  py::class_<Probe>(m, "GpuProbe", "Runs the probe of a device's topology (docs/topology.md).")
      .def(py::init([](const std::string& platform, int device, uint64_t memory_bytes, uint64_t address) {
             const Vendor vendor = vendor_of(platform);
             py::gil_scoped_release release;
             return std::make_unique<Probe>(vendor, device, memory_bytes, address);
           }),
           py::arg("platform"), py::arg("device"), py::arg("memory_bytes"), py::arg("address") = 0)
      .def_property_readonly("name", [](const Probe& p) { return p.device().name(); })
      .def_property_readonly("arch", [](const Probe& p) { return p.device().architecture().name; })
      .def_property_readonly("driver_version", [](const Probe& p) { return p.device().api().version; })
      .def_property_readonly("units", [](const Probe& p) { return p.device().multiprocessors(); })
      .def_property_readonly("memory_bytes", &Probe::memory_bytes)
      .def("run",
           [](Probe& p, const Array<uint32_t>& unit_of, const Array<uint32_t>& jobs, const Array<uint32_t>& tracks, const Array<int32_t>& track_of,
              const Array<uint32_t>& blocks, const Array<uint32_t>& readings, uint32_t block_shift, uint32_t steps,
              uint32_t batches, uint32_t rounds, uint32_t warm_up, double limit_s, uint32_t touch,
              uint32_t looks) {
             const Probe::Work work{.unit_of = structs<uint32_t>(unit_of),
                                    .jobs = structs<topology::Job>(jobs),
                                    .tracks = structs<topology::Range>(tracks),
                                    .track_of = {track_of.data(), track_of.data() + track_of.size()},
                                    .blocks = structs<uint32_t>(blocks),
                                    .readings = structs<topology::Range>(readings),
                                    .steps = steps,
                                    .block_shift = block_shift,
                                    .batches = batches,
                                    .rounds = rounds,
                                    .warm_up = warm_up,
                                    .touch = touch,
                                    .looks = looks,
                                    .limit_s = limit_s};
             Probe::Found found;
             {
               py::gil_scoped_release release;
               found = p.run(work);
             }
             return py::make_tuple(looks ? fields(found.lines) : fields(found.results), fields(found.units));
           },
           py::kw_only(), py::arg("unit_of"), py::arg("jobs"), py::arg("tracks"), py::arg("track_of"), py::arg("blocks"), py::arg("readings"),
           py::arg("block_shift"), py::arg("steps"), py::arg("batches"), py::arg("rounds"), py::arg("warm_up"), py::arg("limit_s"), py::arg("touch") = 0, py::arg("looks") = 0,
           "One launch: u32 [jobs, 2] ticks, or with looks u32 [blocks, 4], and u32 [units, 16] reports (probe/probe.h).")
      .def("clusters", &Probe::clusters, py::arg("size"), py::call_guard<py::gil_scoped_release>(),
           "For each block of a launch of clusters of this size its SM and its cluster; empty where there are none.");
}

}  // namespace

void bind(py::module_& m) {
  read_environment();
  py::register_local_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const Failure& failure) {
      const bool value = failure.code == Code::kInvalid || failure.code == Code::kUnsupported;
      py::set_error(value ? PyExc_ValueError : PyExc_RuntimeError, failure.what());
    }
  });

  m.def("gpu_registrations", [] { return handlers(decode_handler); },
        "XLA FFI handlers by platform (CUDA, ROCM) and custom call target.");
  m.def("gpu_test_registrations", [] { return handlers(decode_handler_for_tests); },
        "The same handlers for XLA's platform cpu: they need a stand-in for the driver that works on host memory.");
  m.def("gpu_library_dirs", &set_library_dirs, py::arg("dirs"), "Sets where drivers and compilers are looked for first.");
  m.def("gpu_headers", [] {
    py::dict all;
    for (const Header& header : headers()) all[header.name] = header.text;
    return all;
  }, "The kernel's headers by path.");

#define PROGRAM py::arg("ints"), py::arg("floats"), py::arg("layers"), py::arg("ropes"), py::arg("tiles")
  m.def("gpu_stub",
        [](const Array<int64_t>& ints, const Array<float>& floats, const Array<int64_t>& layers, const Array<double>& ropes,
           const Array<int64_t>& tiles, int64_t batch, int64_t splits, int64_t task_heads, int64_t shared_bytes, int64_t capacity, bool trace, bool near,
           bool placed) {
          Request request = read_request(attributes(ints, floats, layers, ropes, tiles), batch, splits, task_heads);
          set_capacity(request, capacity);
          request.trace = trace;
          request.near = near;
          request.placed = placed_if(placed, request);
          return stub(request, shared_bytes);
        },
        PROGRAM, py::kw_only(), py::arg("batch"), py::arg("splits"), py::arg("task_heads"), py::arg("shared_bytes"),
        py::arg("capacity") = 0, py::arg("trace") = false, py::arg("near") = false, py::arg("placed") = false, "The source that is compiled for a program (docs/kernel.md).");
  m.def("gpu_workspace_bytes",
        [](const Array<int64_t>& ints, const Array<float>& floats, const Array<int64_t>& layers, const Array<double>& ropes,
           const Array<int64_t>& tiles, int64_t batch, int64_t splits, int64_t task_heads, bool placed) {
          Request request = read_request(attributes(ints, floats, layers, ropes, tiles), batch, splits, task_heads);
          request.placed = placed_if(placed, request);
          return workspace_size(request).bytes;
        },
        PROGRAM, py::kw_only(), py::arg("batch"), py::arg("splits"), py::arg("task_heads"), py::arg("placed") = false,
        "Size of the custom call's last result.");
  m.def("gpu_compile",
        [](const Array<int64_t>& ints, const Array<float>& floats, const Array<int64_t>& layers, const Array<double>& ropes,
           const Array<int64_t>& tiles, int64_t batch, int64_t splits, int64_t task_heads, const std::string& arch, int64_t capacity, bool trace,
           bool near, bool placed) {
          const Architecture a = architecture(arch);
          Request request = read_request(attributes(ints, floats, layers, ropes, tiles), batch, splits, task_heads);
          set_capacity(request, capacity);
          request.trace = trace;
          request.near = near;
          request.placed = placed_if(placed, request);
          if (request.program.platform != static_cast<int64_t>(a.vendor) || request.program.wave_size != a.wave_size) {
            throw std::invalid_argument("the plan is not for " + a.name);
          }
          std::shared_ptr<const Built> built;
          {
            py::gil_scoped_release release;
            built = build(a, request, [] {  // Ctrl-C: Python runs its handlers here
              py::gil_scoped_acquire python;
              if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              return false;
            });
          }
          py::dict result;
          result["code"] = py::bytes(built->code);
          result["path"] = built->path;
          result["seconds"] = built->seconds;
          return result;
        },
        PROGRAM, py::kw_only(), py::arg("batch"), py::arg("splits"), py::arg("task_heads"), py::arg("arch"),
        py::arg("capacity") = 0, py::arg("trace") = false, py::arg("near") = false, py::arg("placed") = false, "Compiles a program's kernel, or takes it from the cache: binary, file and seconds.");
#undef PROGRAM
  m.def("gpu_shared_bytes", [](const std::string& arch) { return architecture(arch).shared_bytes; }, py::arg("arch"),
        "Shared memory of a unit on an architecture.");
  m.def("gpu_describe", &describe, py::arg("platform"),
        "Name, bus, memory, units, shared memory and peers of each device; and its architecture, or the problem with it.");
  m.def("gpu_driver", [](const std::string& platform) {
    const Driver& d = driver(vendor_of(platform));
    return py::make_tuple(d.version, d.path);
  }, py::arg("platform"), "Version and library of the driver.");
  m.def("gpu_devices", &devices, py::arg("platform"), "Ordinal, name, architecture, number of units, rate of the kernel's ticks, driver version, bus and UUID of each device it runs on.");
  bind_probe(m);
  m.def("gpu_compiler", [](const std::string& platform) {
    const Compiler& c = compiler(vendor_of(platform));
    return py::make_tuple(c.version, c.path);
  }, py::arg("platform"), "Version and library of the run-time compiler.");
}

}  // namespace monokernel::gpu
