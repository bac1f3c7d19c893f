// Mailboxes for Python (jax_monokernel/mailbox.py).
#pragma once

#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

#include "mailbox.h"

namespace monokernel {

inline void bind_mailbox(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Mailbox, std::shared_ptr<Mailbox>>(m, "Mailbox", "Where a decode leaves its tokens while it runs.")
      .def(py::init(&Mailbox::make), py::arg("rows"), py::arg("capacity"))
      .def_property_readonly("id", &Mailbox::id)
      .def_property_readonly("rows", &Mailbox::rows)
      .def_property_readonly("capacity", &Mailbox::capacity)
      .def_property_readonly("stopped", &Mailbox::stopped)
      .def_property_readonly("cancelled", &Mailbox::cancelled)
      .def_property_readonly("finished", &Mailbox::finished)
      .def("claim", [](Mailbox& box, int64_t row) { return row >= 0 && row < box.rows() && box.claim(row); }, py::arg("row"))
      .def("put",
           [](Mailbox& box, int64_t row, int32_t token, float log_prob) {
             if (row < 0 || row >= box.rows() || box.count(row) >= box.capacity()) throw std::invalid_argument("the row has no room");
             box.put(row, token, log_prob);
           },
           py::arg("row"), py::arg("token"), py::arg("log_prob"), "Adds a token to a row; one thread at a time for each row.")
      .def("finish", &Mailbox::finish, "Nothing more will come.")
      .def("stop", &Mailbox::stop, "Asks the call that writes here to end after the token that it is about.")
      .def("take",
           [](Mailbox& box, double wait_s, double nap_s) {
             if (wait_s > 0) {
               py::gil_scoped_release release;
               box.wait(wait_s, nap_s);
             }
             py::list all;
             for (const Mailbox::Piece& p : box.take()) {
               all.append(py::make_tuple(p.row, p.index, p.record.token, p.record.log_prob, p.record.time_ns));
             }
             return all;
           },
           py::arg("wait_s") = 0.0, py::arg("nap_s") = 0.0,
           "What has come since the last time: (row, index, token, log_prob, time in ns), in order of time. Waits so long where "
           "there is nothing, or until a signal comes; before that, it naps so long, which tokens do not end, but the last does.")
      .def("arm", [](Mailbox& box, bool nap) { return box.arm(nap ? Mailbox::kNap : Mailbox::kUntilMail); }, py::arg("nap") = false,
           "Lets the next change make fileno() readable, or nap: the end alone; False if there is nothing to wait for.")
      .def("fileno",
           [](Mailbox& box) {
             try {
               return box.file();
             } catch (const std::system_error& e) {
               errno = e.code().value();
               PyErr_SetFromErrno(PyExc_OSError);
               throw py::error_already_set();
             }
           })
      .def("drain", &Mailbox::drain, "Makes fileno() unreadable again.")
      .def_static("now_ns", &Mailbox::now_ns, "The clock of the times, in ns.");
  m.def("find_mailbox", &Mailbox::find, py::arg("id"), "The mailbox of this number, or None.");
}

}  // namespace monokernel
