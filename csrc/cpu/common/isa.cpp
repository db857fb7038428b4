#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lorasp {
namespace {

struct IsaEntry {
  const char* name;
  bool compiled;
  std::vector<std::string> features;
};

const std::vector<IsaEntry>& entries() {
  static const std::vector<std::string> avx512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"};
  static const auto with = [](std::vector<std::string> base, const std::vector<std::string>& more) {
    base.insert(base.end(), more.begin(), more.end());
    return base;
  };
#if defined(__x86_64__)
  constexpr bool kX86 = true;
#else
  constexpr bool kX86 = false;
#endif
#if defined(__linux__)
  constexpr bool kLinux = true;
#else
  constexpr bool kLinux = false;
#endif
  static const std::vector<IsaEntry> table = {
      {"portable", true, {}},
      {"avx2", kX86, {"avx2", "fma", "f16c"}},
      {"avx512", kX86, avx512},
      {"avx512_bf16", kX86, with(avx512, {"avx512_bf16"})},
      {"amx", kX86 && kLinux, with(avx512, {"avx512_bf16", "amx_tile", "amx_bf16"})},
  };
  return table;
}

#if defined(__x86_64__)
uint64_t enabled_state() {  // XCR0
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the 8 KiB of tile state per process, on request.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<std::string> detect_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  uint32_t eax, ebx1, ecx1, edx1, eax7, ebx7 = 0, ecx7 = 0, edx7 = 0, eax71 = 0, unused;
  if (!__get_cpuid(1, &eax, &ebx1, &ecx1, &edx1)) return found;
  const bool has_leaf_7 = __get_cpuid_count(7, 0, &eax7, &ebx7, &ecx7, &edx7);
  if (has_leaf_7 && eax7 >= 1) {
    uint32_t ebx, ecx;
    __get_cpuid_count(7, 1, &eax71, &ebx, &ecx, &unused);
  }
  const uint64_t state = ecx1 & bit_OSXSAVE ? enabled_state() : 0;
  constexpr uint64_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
  const auto add = [&](bool present, uint64_t needs, const char* name) {
    if (present && (state & needs) == needs) found.emplace_back(name);
  };
  add(ebx7 >> 5 & 1, kYmm, "avx2");
  add(ecx1 >> 12 & 1, kYmm, "fma");
  add(ecx1 >> 29 & 1, kYmm, "f16c");
  add(ebx7 >> 8 & 1, 0, "bmi2");
  add(ebx7 >> 16 & 1, kZmm, "avx512f");
  add(ebx7 >> 30 & 1, kZmm, "avx512bw");
  add(ebx7 >> 17 & 1, kZmm, "avx512dq");
  add(ebx7 >> 31 & 1, kZmm, "avx512vl");
  add(ecx7 >> 6 & 1, kZmm, "avx512_vbmi2");
  add(eax71 >> 5 & 1, kZmm, "avx512_bf16");
  const bool tiles = (edx7 >> 24 & 1) && (state & kTiles) == kTiles && tiles_permitted();
  add(tiles, kTiles, "amx_tile");
  add(tiles && (edx7 >> 22 & 1), kTiles, "amx_bf16");
#endif
  return found;
}

bool is_available(const IsaEntry& entry) {
  if (!entry.compiled) return false;
  for (const std::string& feature : entry.features) {
    bool found = false;
    for (const std::string& present : cpu_features()) found = found || present == feature;
    if (!found) return false;
  }
  return true;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

int choose(const std::string& name, const char* source) {
  const auto& table = entries();
  int best = -1;
  for (size_t i = 0; i < table.size(); ++i) {
    if (is_available(table[i]) && (name.empty() || name == table[i].name)) best = static_cast<int>(i);
  }
  if (best < 0) {
    throw std::runtime_error(std::string(source) + " must be one of " + joined(available_isas()) + " here, got " +
                             name);
  }
  return best;
}

int choose_default() {
  const char* wanted = std::getenv("LORASP_CPU_ISA");
  return choose(wanted ? wanted : "", "LORASP_CPU_ISA");
}

std::atomic<int> active{-1};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const IsaEntry& entry : entries()) {
    if (entry.compiled) names.emplace_back(entry.name);
  }
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaEntry& entry : entries()) {
    if (is_available(entry)) names.emplace_back(entry.name);
  }
  return names;
}

std::vector<std::string> cpu_features() {
  static const std::vector<std::string> features = detect_features();
  return features;
}

std::string cpu_vendor() {
#if defined(__x86_64__)
  uint32_t eax, words[3];
  if (!__get_cpuid(0, &eax, &words[0], &words[2], &words[1])) return "";
  char name[13] = {};
  std::memcpy(name, words, 12);
  return name;
#else
  return "";
#endif
}

Isa active_isa() {
  int isa = active.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = choose_default();
    active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

std::string active_isa_name() { return entries()[static_cast<size_t>(active_isa())].name; }

void set_isa(const std::string& name) { active.store(name.empty() ? choose_default() : choose(name, "set_isa: name")); }

}  // namespace lorasp
