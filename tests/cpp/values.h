// Random arrays of every element type.
#pragma once

#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/dtype.h"

inline std::mt19937 generator(0);

template <typename T>
constexpr stamp_fast::DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return stamp_fast::DType::kFloat64;
  if constexpr (std::is_same_v<T, stamp_fast::BFloat16>) return stamp_fast::DType::kBFloat16;
  if constexpr (std::is_same_v<T, stamp_fast::Float16>) return stamp_fast::DType::kFloat16;
  return stamp_fast::DType::kFloat32;
}

template <typename T>
std::vector<T> random_values(int64_t count) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<T> values(static_cast<size_t>(count));
  for (auto& value : values) value = stamp_fast::narrow<T>(uniform(generator));
  return values;
}
