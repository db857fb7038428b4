// The Python module lorasp._C: build facts, CPU features, and hooks for the tests. Importing it registers the
// operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>

#include "cpu/common/dtype.h"
#include "cpu/common/isa.h"
#include "cpu/common/keep_bits.h"
#include "cpu/common/scratch.h"
#include "cpu/lora_linear/plan.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["torch"] = TORCH_VERSION;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["isas"] = lorasp::compiled_isas();
#if defined(LORASP_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

// Keep bits of elements start ... start + count - 1 by the active instruction set, one byte 0 or 1 each.
py::bytes keep_mask(int64_t seed, int64_t start, int64_t count, uint32_t threshold, uint32_t purpose, uint32_t member) {
  if (start < 0 || count < 0) throw py::value_error("keep_mask: start and count must not be negative");
  std::vector<uint32_t> words(static_cast<size_t>(lorasp::ceil_div(count, 32)));
  const lorasp::KeepMask mask{static_cast<uint64_t>(seed), purpose, member, threshold};
  lorasp::keep_bits_kernel()(mask, start, count, words.data());
  std::string bytes(static_cast<size_t>(count), '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(words[i / 32] >> (i % 32) & 1);
  return bytes;
}

// What plan `auto` means, as (forward, backward).
std::pair<std::string, std::string> auto_plans(const std::string& dtype, int64_t M, int64_t N, int64_t K, bool packed,
                                               bool dropout, bool trains_A) {
  const bool known = dtype == "float32" || dtype == "bfloat16" || dtype == "float16";
  if (!known) throw py::value_error("auto_plans: dtype must be float32, bfloat16 or float16, got " + dtype);
  const lorasp::DType type = dtype == "float32"    ? lorasp::DType::kF32
                             : dtype == "bfloat16" ? lorasp::DType::kBF16
                                                   : lorasp::DType::kF16;
  return {lorasp::auto_plan({type, M, N, K, packed, dropout}),
          lorasp::auto_plan({type, M, N, K, packed, dropout || trains_A})};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info);
  m.def("cpu_features", &lorasp::cpu_features);
  m.def("cpu_vendor", &lorasp::cpu_vendor);
  m.def("available_isas", &lorasp::available_isas);
  m.def("active_isa", &lorasp::active_isa_name);
  m.def("set_isa", &lorasp::set_isa, py::arg("name"), "For tests; an empty name returns to the default.");
  m.def("auto_plans", &auto_plans, py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("packed"),
        py::arg("dropout"), py::arg("trains_A"), "The plans (forward, backward) that `auto` takes for a product.");
  m.def("keep_mask", &keep_mask, py::arg("seed"), py::arg("start"), py::arg("count"), py::arg("threshold"),
        py::arg("purpose") = 0, py::arg("member") = 0);
  m.def(
      "poison_scratch", [](bool on) { lorasp::ScratchFrame::poison() = on; }, py::arg("on"),
      "For tests: fill the kernels' own memory with NaN before each use.");
}
