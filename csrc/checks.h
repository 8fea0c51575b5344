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

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ")";
  return text.str();
}

inline void check_same_device(const char* op, const std::string& name, const torch::stable::Tensor& tensor,
                              const torch::stable::Tensor& first) {
  SF_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, name,
           " must be on the device of tensors[0], ", first.is_cuda() ? "cuda:" : "cpu:", first.get_device_index(),
           ", got ", tensor.is_cuda() ? "cuda:" : "cpu:", tensor.get_device_index());
}

}  // namespace stamp_fast
