// Where a decode leaves its tokens while it runs, for whoever reads them in the same process.
//
// A mailbox has room for all tokens of a call, so that writing never waits for reading. Each row has one writer; any number of
// rows are written at once. One thread at a time reads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace monokernel {

class Mailbox {
 public:
  struct Record {
    int32_t token;
    float log_prob;    // 0 where the call does not compute it
    uint64_t time_ns;  // of std::chrono::steady_clock
  };
  struct Piece {
    int32_t row, index;  // the row's index-th token
    Record record;
  };

  // Throws std::invalid_argument, std::bad_alloc.
  static std::shared_ptr<Mailbox> make(int64_t rows, int64_t capacity);
  // The living mailbox of this number, or nullptr.
  static std::shared_ptr<Mailbox> find(int32_t id);
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  int32_t id() const { return id_; }
  int64_t rows() const { return rows_; }
  int64_t capacity() const { return capacity_; }  // tokens of a row

  // ---- The writers ----

  // True for the first caller: it alone may write to the row.
  bool claim(int64_t row) { return !row_[row].claimed.exchange(true); }
  // Adds a token to a row, whose room must not be used up.
  void put(int64_t row, int32_t token, float log_prob, uint64_t time_ns = now_ns());
  int64_t count(int64_t row) const { return row_[row].count.load(std::memory_order_relaxed); }
  // Nothing more will come for a while: a reader that naps may take what there is.
  void end_nap() {
    if (armed_.load() == kNap) wake();
  }
  // Nothing more will come.
  void finish();
  // The call was ended by what ends every call (cpu/interrupt.h). Those that follow for the same reader are not to begin.
  void set_cancelled() {
    cancelled_.store(true);
    stop();
  }

  // ---- The reader ----

  // Asks the call that writes here to end after the token that it is about.
  void stop() { __atomic_store_n(&stop_, 1u, __ATOMIC_RELAXED); }
  bool stopped() const { return __atomic_load_n(&stop_, __ATOMIC_RELAXED) != 0; }
  // Not 0 once the call is to end, for code that has no use for this class.
  const uint32_t* stop_word() const { return &stop_; }
  bool cancelled() const { return cancelled_.load(); }
  bool finished() const { return finished_.load(); }
  // What has come since the last time, in order of time.
  std::vector<Piece> take();
  // What a reader that sleeps is woken by. A nap costs the writers nothing: tokens do not end it, but their end does.
  enum Sleep : uint32_t { kAwake, kUntilMail, kNap };
  // Naps, then waits until there is something to take; until nothing more will come or a signal comes, and each for so long at
  // most.
  void wait(double seconds, double nap_seconds = 0);
  // The same for event loops: a file that the next change after arm() makes readable, and drain() unreadable. Throws
  // std::system_error: no more files.
  int file();
  // False if there is nothing to wait for.
  bool arm(Sleep how, bool by_file = true);
  void drain();

  static uint64_t now_ns();

 private:
  Mailbox(int64_t rows, int64_t capacity);
  bool has_news() const;
  // False after a signal.
  bool sleep(Sleep how, double seconds);
  void wake();

  struct alignas(64) Row {  // a cache line, since its writer is another thread than the next row's
    std::atomic<int64_t> count{0};
    std::atomic<bool> claimed{false};
    int64_t taken = 0;
  };
  int32_t id_ = 0;
  const int64_t rows_, capacity_;
  std::unique_ptr<Record[]> records_;  // [rows, capacity]
  std::unique_ptr<Row[]> row_;
  std::mutex reading_;
  int pipe_[2] = {-1, -1};  // made when file() is asked for
  std::atomic<bool> by_file_{false};  // whether the reader that sleeps waits for the pipe
  alignas(64) std::atomic<uint32_t> armed_{kAwake};  // how the reader sleeps, or is about to
  alignas(64) uint32_t stop_ = 0;
  std::atomic<bool> cancelled_{false}, finished_{false};
};

// The rows that the requests of one call write to: what the operand "mailbox", int32 [batch, 2], says.
struct MailRows {
  std::shared_ptr<Mailbox> box;  // nullptr: nobody listens
  std::vector<int64_t> rows;     // [batch], -1: this request is not listened to

  bool stopped() const { return box && box->stopped(); }
  void put(int64_t request, int32_t token, float log_prob, uint64_t time_ns = Mailbox::now_ns()) const {
    const int64_t row = rows[static_cast<size_t>(request)];
    if (row >= 0) box->put(row, token, log_prob, time_ns);
  }
};

// Finds the mailbox of a call that makes up to `steps` tokens for each request, and claims the rows. `operand` holds a mailbox's
// number (0: none) and a row for each request. Returns what is wrong; empty: nothing.
std::string open_mail(const int32_t* operand, int64_t batch, int64_t steps, MailRows* rows);

}  // namespace monokernel
