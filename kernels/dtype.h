// The element types of the kernels. 16-bit floats are plain structs: kernels then need neither torch nor
// compiler extensions and give the same bits on every device.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define SF_HOST_DEVICE __host__ __device__
#else
#define SF_HOST_DEVICE
#endif

namespace stamp_fast {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Products and sums of T are taken in this type.
template <typename T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// std::bit_cast is a host function to nvcc.
template <typename To, typename From>
SF_HOST_DEVICE inline To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

SF_HOST_DEVICE inline float widen(float value) { return value; }
SF_HOST_DEVICE inline double widen(double value) { return value; }
SF_HOST_DEVICE inline float widen(BFloat16 value) { return bit_copy<float>(static_cast<uint32_t>(value.bits) << 16); }

SF_HOST_DEVICE inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals in one exact step.
  const float scaled = bit_copy<float>(magnitude) * 0x1p112f;
  // Infinity and NaN keep their mantissa. A mask, because compilers do not vectorise the choice.
  const uint32_t special = 0u - static_cast<uint32_t>(magnitude >= 0x0f800000u);
  return bit_copy<float>(sign | (bit_copy<uint32_t>(scaled) & ~special) | ((magnitude | 0x7f800000u) & special));
}

template <typename T>
SF_HOST_DEVICE T narrow(accumulator_t<T> value) {
  return value;
}

template <>
SF_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  // Round to nearest, ties to even; a NaN must not round up to infinity.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
SF_HOST_DEVICE inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a subnormal half
    // Adding 0.5 aligns the mantissa so that the floating-point unit does the rounding.
    half = bit_copy<uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// Calls function(T{}) with the C++ type of `dtype`. Without the pragma nvcc refuses functions for the host alone.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Function>
SF_HOST_DEVICE void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat64:
      return function(double{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
}

// Bytes of one accumulator_t of `dtype`.
inline int64_t accumulator_size(DType dtype) {
  return static_cast<int64_t>(dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

}  // namespace stamp_fast
