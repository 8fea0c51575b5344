// The one pybind11 file: the channel graph as the Python module stamp_fast._graph. No tensor crosses here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "channel_graph.h"

namespace py = pybind11;

namespace stamp_fast {
namespace {

using Keep = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

int64_t to_integer(PyObject* number) {
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow == 0) return value;
  return overflow > 0 ? INT64_MAX : INT64_MIN;
}

// `ref` is the Python class (a subclass of int) that marks a tensor index among the arguments.
Value to_value(py::handle object, PyObject* ref, int depth = 0) {
  if (depth > 16) throw std::invalid_argument("channel graph: an operator's arguments are nested too deeply");
  Value value;
  PyObject* raw = object.ptr();
  if (raw == Py_None) return value;
  if (reinterpret_cast<PyObject*>(Py_TYPE(raw)) == ref) {
    value.kind = Value::Kind::kTensor;
    value.integer = to_integer(raw);
  } else if (PyBool_Check(raw)) {
    value.kind = Value::Kind::kBool;
    value.integer = raw == Py_True;
  } else if (PyLong_Check(raw)) {
    value.kind = Value::Kind::kInt;
    value.integer = to_integer(raw);
  } else if (PyFloat_Check(raw)) {
    value.kind = Value::Kind::kFloat;
    value.real = PyFloat_AsDouble(raw);
  } else if (PyList_Check(raw) || PyTuple_Check(raw)) {
    value.kind = Value::Kind::kList;
    for (const py::handle item : py::reinterpret_borrow<py::sequence>(object))
      value.list.push_back(to_value(item, ref, depth + 1));
  } else {
    value.kind = Value::Kind::kString;
    value.text = py::str(object);
  }
  return value;
}

std::unique_ptr<ChannelGraph> build(const std::vector<std::vector<int64_t>>& shapes, const py::list& ops,
                                    const std::vector<bool>& is_parameter, std::vector<int32_t> outputs,
                                    std::vector<int32_t> pinned, int32_t num_costed_ops, const py::object& ref,
                                    const std::vector<std::array<int32_t, 4>>& ties,
                                    std::vector<std::pair<int32_t, int32_t>> survivors, std::vector<int32_t> batched,
                                    int64_t batch) {
  Record record;
  record.batched = std::move(batched);
  record.batch = batch;
  for (const auto& shape : shapes) record.tensors.push_back({shape});
  record.num_slots = static_cast<int32_t>(is_parameter.size());
  record.is_parameter = is_parameter;
  record.outputs = std::move(outputs);
  record.pinned = std::move(pinned);
  record.num_costed_ops = num_costed_ops;
  record.survivors = std::move(survivors);
  for (const auto& [first, first_dim, second, second_dim] : ties)
    record.ties.push_back({first, first_dim, second, second_dim});
  for (const py::handle item : ops) {
    const auto call = item.cast<py::tuple>();
    if (call.size() != 3) throw std::invalid_argument("channel graph: an operator is (name, arguments, outputs)");
    Op op;
    op.name = call[0].cast<std::string>();
    for (const py::handle arg : call[1].cast<py::sequence>()) op.args.push_back(to_value(arg, ref.ptr()));
    op.outs = call[2].cast<std::vector<int32_t>>();
    record.ops.push_back(std::move(op));
  }
  return std::make_unique<ChannelGraph>(std::move(record));
}

const uint8_t* checked(const ChannelGraph& graph, const Keep& keep) {
  if (keep.ndim() != 1 || keep.shape(0) != graph.num_classes())
    throw std::invalid_argument("keep must hold one byte for each of the " + std::to_string(graph.num_classes()) +
                                " classes");
  return keep.data();
}

py::list terms(const std::vector<CostTerm>& costs) {
  py::list result;
  for (const CostTerm& term : costs) result.append(py::make_tuple(term.source, term.constant, term.axes));
  return result;
}

// int64, as torch indexes with.
py::array_t<int64_t> axis_classes(const ChannelGraph& graph, int32_t axis) {
  const auto& layer = graph.axes().at(axis).layers[0];
  py::array_t<int64_t> classes(static_cast<py::ssize_t>(layer.size()));
  std::copy(layer.begin(), layer.end(), classes.mutable_data());
  return classes;
}

}  // namespace

PYBIND11_MODULE(_graph, m) {
  m.doc() = "Channel provenance of a traced network.";
  py::class_<Group>(m, "Group")
      .def_readonly("slot", &Group::slot)
      .def_readonly("dim", &Group::dim)
      .def_readonly("first_class", &Group::first_class)
      .def_readonly("num_classes", &Group::num_classes)
      .def_readonly("channels", &Group::channels)
      .def_readonly("event", &Group::event);
  py::class_<ClassRead>(m, "Read")
      .def_readonly("op", &ClassRead::op)
      .def_readonly("tensor", &ClassRead::tensor)
      .def_readonly("dim", &ClassRead::dim)
      .def_readonly("exact", &ClassRead::exact)
      .def_readonly("slot", &ClassRead::slot)
      .def_readonly("slot_dim", &ClassRead::slot_dim)
      .def_readonly("axis", &ClassRead::axis);
  py::class_<ChannelGraph>(m, "ChannelGraph")
      .def(py::init(&build), py::arg("shapes"), py::arg("ops"), py::arg("is_parameter"), py::arg("outputs"),
           py::arg("pinned"), py::arg("num_costed_ops"), py::arg("ref"),
           py::arg("ties") = std::vector<std::array<int32_t, 4>>{},
           py::arg("survivors") = std::vector<std::pair<int32_t, int32_t>>{},
           py::arg("batched") = std::vector<int32_t>{}, py::arg("batch") = 1)
      .def_property_readonly("num_classes", &ChannelGraph::num_classes)
      .def_property_readonly("groups", &ChannelGraph::groups)
      .def_property_readonly("frozen", &ChannelGraph::frozen)
      .def_property_readonly("events",
                             [](const ChannelGraph& graph) {
                               py::list events;
                               for (const FreezeEvent& event : graph.events())
                                 events.append(py::make_tuple(event.reason, event.op));
                               return events;
                             })
      .def_property_readonly(
          "axes",
          [](const ChannelGraph& graph) {
            py::list axes;
            for (const ClassAxis& axis : graph.axes()) {
              py::list layers;
              for (const auto& layer : axis.layers)
                layers.append(py::array_t<int32_t>(static_cast<py::ssize_t>(layer.size()), layer.data()));
              axes.append(layers);
            }
            return axes;
          })
      .def_property_readonly("macs_terms", [](const ChannelGraph& graph) { return terms(graph.macs_terms()); })
      .def_property_readonly("params_terms", [](const ChannelGraph& graph) { return terms(graph.params_terms()); })
      .def_property_readonly("reads", &ChannelGraph::reads)
      .def_property_readonly("survivors", &ChannelGraph::survivors)
      .def_property_readonly("candidates", &ChannelGraph::candidates)
      .def("axis_of", [](const ChannelGraph& graph, int32_t tensor, int dim) { return graph.axis_of(tensor, dim); })
      .def_property_readonly("slot_axes", &ChannelGraph::slot_axes,
                             "Per slot and dim the axis; -1 if it never shrinks.")
      .def("axis_classes", &axis_classes, "Class of every position of an axis; -1 where it never goes.")
      .def("macs", [](const ChannelGraph& graph,
                      const Keep& keep) { return graph.cost(graph.macs_terms(), checked(graph, keep)); })
      .def("params", [](const ChannelGraph& graph,
                        const Keep& keep) { return graph.cost(graph.params_terms(), checked(graph, keep)); })
      .def("shapes", [](const ChannelGraph& graph, const Keep& keep) { return graph.shapes(checked(graph, keep)); })
      .def("scalar_args",
           [](const ChannelGraph& graph, const Keep& keep) {
             const uint8_t* bytes = checked(graph, keep);
             py::list result;
             for (const ScalarArg& arg : graph.scalar_args())
               result.append(py::make_tuple(arg.op, arg.arg, graph.live(arg.axis, bytes)));
             return result;
           })
      .def("live_before", [](const ChannelGraph& graph, int32_t axis, int64_t end,
                             const Keep& keep) { return graph.live_before(axis, end, checked(graph, keep)); })
      .def("groups_of", &ChannelGraph::groups_of, py::arg("tensor"), py::arg("dim") = -1)
      .def("freeze_event", &ChannelGraph::freeze_event)
      .def("is_slot_view", &ChannelGraph::is_slot_view);
}

}  // namespace stamp_fast
