// The low-rank factors of a group of adapters, each of which may train whole or in part (LoRA-SP): the part that trains
// and the frozen rest put together, and the layout that the part's gradient has.
//     A (R, K): lora_A itself; or frozen_A with its columns, or its flat entries, replaced by lora_A.
//     B (N, R): lora_B itself; or frozen_B, or zeros, with its rows, or its flat entries, replaced by lora_B.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "../common/scratch.h"
#include "arguments.h"
#include "columns.h"
#include "gradient.h"

namespace lorasp {

using OptionalTensors = c10::List<std::optional<Tensor>>;

// The operator's arguments as they come, one of each per member.
struct FactorArguments {
  at::TensorList lora_As, lora_Bs;
  const OptionalTensors& frozen_As;
  const OptionalTensors& frozen_Bs;
  const OptionalTensor& columns;
  const OptionalTensors& rows;
  const OptionalTensors& entries_A;
  const OptionalTensors& entries_B;
};

struct Adapter {
  int64_t N, R;
  int64_t first_rank;  // the ranks of the members before it
  Tensor lora_A, lora_B;
  OptionalTensor frozen_A, frozen_B, rows, entries_A, entries_B;
  const void* A = nullptr;  // (R, K), compute dtype, contiguous
  const void* B = nullptr;  // (N, R)
};

class Adapters {
 public:
  // Checks every shape, dtype and index. outputs: N of each member; x: a tensor of the compute dtype.
  Adapters(const char* op, const FactorArguments& arguments, int64_t K, at::IntArrayRef outputs,
           at::ScalarType compute);

  size_t size() const { return members_.size(); }
  const Adapter& operator[](size_t i) const { return members_[i]; }
  int64_t total_rank() const { return total_rank_; }
  const Columns* columns() const { return columns_ ? &*columns_ : nullptr; }

  // Sets the members' A and B, made in the frame where they are not there already. All A stand one under another.
  void build_A(ScratchFrame& frame);
  void build_B(ScratchFrame& frame);

  // A zeroed or empty tensor for a gradient in the parameter's layout, and what to write there.
  Tensor make_dA(size_t i, bool zero) const;
  Tensor make_dB(size_t i, bool zero) const;
  Gradient gradient_A(size_t i, const Tensor& out, const Tensor& mask) const;
  Gradient gradient_B(size_t i, const Tensor& out, const Tensor& mask) const;

 private:
  bool spreads_A(size_t i) const { return columns_ && !members_[i].frozen_A; }
  bool spreads_B(size_t i) const;

  const char* op_;
  int64_t K_;
  at::ScalarType compute_;
  int64_t total_rank_ = 0;
  Tensor columns_index_;
  std::optional<Columns> columns_;
  c10::SmallVector<Adapter, 4> members_;
  c10::SmallVector<Tensor, 16> held_;  // rounded copies
};

}  // namespace lorasp
