// The Python module: what was built, and whatever is not a tensor op. The ops register themselves
// (TORCH_LIBRARY_IMPL at the end of each file under cpu/ and cuda/) when this library is loaded.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

namespace {

std::string instruction_set() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "baseline";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu"] = instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native kernels of rlhf_kernels; importing this module registers them.";
  m.def("build_info", &build_info, "What the module was built with: torch, compiler, cpu instruction set.");
}
