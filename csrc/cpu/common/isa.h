// Which instruction sets this binary has kernels for, which this machine runs, and which one is in use.
#pragma once
#include <string>
#include <vector>

namespace lorasp {

// Ascending; names: portable, avx2, avx512, avx512_bf16, amx.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();
// CPU feature flags that the choice looks at, as far as CPU and operating system offer them.
std::vector<std::string> cpu_features();
// "GenuineIntel", "AuthenticAMD", ...; empty where cpuid does not exist.
std::string cpu_vendor();

// The environment variable LORASP_CPU_ISA, else the highest available. Throws std::runtime_error for a name that is
// unknown or not available.
Isa active_isa();
std::string active_isa_name();
// Empty returns to the default. Affects calls that start afterwards.
void set_isa(const std::string& name);

}  // namespace lorasp
