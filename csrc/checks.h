// Argument checks. Every message names the operator, the argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>

#define SF_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

namespace stamp_fast {

// "rows[3]", for messages.
inline std::string item_name(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

inline bool same_shape(const torch::stable::Tensor& one, const torch::stable::Tensor& other) {
  if (one.dim() != other.dim()) return false;
  for (int64_t d = 0; d < one.dim(); ++d) {
    if (one.size(d) != other.size(d)) return false;
  }
  return true;
}

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ")";
  return text.str();
}

inline std::string device_text(const torch::stable::Tensor& tensor) {
  return (tensor.is_cuda() ? "cuda:" : "cpu:") + std::to_string(tensor.get_device_index());
}

inline void check_same_device(const char* op, const std::string& name, const torch::stable::Tensor& tensor,
                              const char* first_name, const torch::stable::Tensor& first) {
  SF_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, name,
           " must be on the device of ", first_name, ", ", device_text(first), ", got ", device_text(tensor));
}

inline void check_float(const char* op, const std::string& name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const auto dtype = tensor.scalar_type();
  SF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
               dtype == ScalarType::Half,
           op, name, " must be float32, float64, bfloat16 or float16, got ", dtype);
}

inline void check_same_dtype(const char* op, const std::string& name, const torch::stable::Tensor& tensor,
                             const std::string& first_name, const torch::stable::Tensor& first) {
  SF_CHECK(tensor.scalar_type() == first.scalar_type(), op, name, " must have the dtype of ", first_name, ", ",
           first.scalar_type(), ", got ", tensor.scalar_type());
}

}  // namespace stamp_fast
