// A selection of the columns of a tall tensor, gathered from rows and from keep bits while both are in cache.
#pragma once
#include <cstdint>
#include <vector>

namespace lorasp {

// index: ascending, inside [0, width), count of them; not copied.
class Columns {
 public:
  Columns(const int64_t* index, int64_t count, int64_t width);

  const int64_t* index() const { return index_; }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

  // The selected ones of columns [c0, c1) of row_count rows, to their place in out; c0 and c1: multiples of 64 or the
  // width. ld and ldo in elements.
  void gather(const void* rows, int64_t ld, int64_t row_count, int64_t element_size, int64_t c0, int64_t c1, void* out,
              int64_t ldo) const;
  // row (width,) of a packed row (count,): the selected elements take its values, the others stay.
  void scatter(const void* packed, int64_t element_size, void* row) const;
  // Bits of all columns to bits of the selected ones. Words of both: ceil(count / 64) * 2 are read and written.
  void gather_bits(const uint32_t* bits, uint32_t* out) const;

 private:
  const int64_t* index_;
  int64_t count_, width_;
  std::vector<uint64_t> words_;     // bit c % 64 of word c / 64: column c is selected
  std::vector<int64_t> positions_;  // selected columns before word w
};

}  // namespace lorasp
