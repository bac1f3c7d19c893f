#include "mailbox.h"

#include <fcntl.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <system_error>

namespace monokernel {
namespace {

// Not std::atomic's own wait, which has no end in time and goes on after a signal, when Python should see it.
#if defined(__linux__)
// Returns false after a signal.
bool sleep_while(std::atomic<uint32_t>& armed, uint32_t value, double seconds) {
  timespec limit{static_cast<time_t>(seconds), static_cast<long>((seconds - static_cast<double>(static_cast<time_t>(seconds))) * 1e9)};
  return syscall(SYS_futex, &armed, FUTEX_WAIT_PRIVATE, value, &limit, nullptr, 0) == 0 || errno != EINTR;
}
void wake_sleeper(std::atomic<uint32_t>& armed) { syscall(SYS_futex, &armed, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }
#else
bool sleep_while(std::atomic<uint32_t>& armed, uint32_t value, double seconds) {
  for (int i = 0; i < seconds * 1e4 && armed.load() == value; i++) {
    if (usleep(100) != 0) return false;
  }
  return true;
}
void wake_sleeper(std::atomic<uint32_t>&) {}
#endif

struct Registry {
  std::mutex mutex;
  // The first is drawn, so that an exported program or an operand that was kept hits no mailbox of another process.
  int32_t last = static_cast<int32_t>(std::random_device()() & 0x3fffffffu);
  std::map<int32_t, std::weak_ptr<Mailbox>> boxes;
};

Registry& registry() {
  static auto* r = new Registry;  // never destroyed: a thread may still decode while the process exits
  return *r;
}

}  // namespace

std::shared_ptr<Mailbox> Mailbox::make(int64_t rows, int64_t capacity) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (rows < 1 || capacity < 1 || rows > kMost || capacity > kMost) {
    throw std::invalid_argument("a mailbox of " + std::to_string(rows) + " rows for " + std::to_string(capacity) +
                                " tokens each; expected 1 to 2147483647 of both");
  }
  std::shared_ptr<Mailbox> box(new Mailbox(rows, capacity));
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  do {
    r.last = r.last == kMost ? 1 : r.last + 1;
  } while (r.boxes.count(r.last));
  box->id_ = r.last;
  r.boxes[r.last] = box;
  return box;
}

std::shared_ptr<Mailbox> Mailbox::find(int32_t id) {
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  const auto found = r.boxes.find(id);
  return found == r.boxes.end() ? nullptr : found->second.lock();
}

Mailbox::Mailbox(int64_t rows, int64_t capacity)
    // Not initialised: memory that no token comes to is never touched.
    : rows_(rows), capacity_(capacity), records_(new Record[static_cast<size_t>(rows) * static_cast<size_t>(capacity)]),
      row_(std::make_unique<Row[]>(static_cast<size_t>(rows))) {}

Mailbox::~Mailbox() {
  for (int end : pipe_) {
    if (end >= 0) close(end);
  }
  if (id_ == 0) return;
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  r.boxes.erase(id_);
}

uint64_t Mailbox::now_ns() {
  using namespace std::chrono;
  return static_cast<uint64_t>(duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count());
}

void Mailbox::put(int64_t row, int32_t token, float log_prob, uint64_t time_ns) {
  const int64_t index = count(row);
  records_[static_cast<size_t>(row * capacity_ + index)] = {token, log_prob, time_ns};
  // Sequentially consistent with arm(): either the reader sees the token, or this sees that the reader sleeps.
  row_[row].count.store(index + 1, std::memory_order_seq_cst);
  if (armed_.load(std::memory_order_seq_cst) == kUntilMail) wake();
}

void Mailbox::finish() {
  finished_.store(true);
  if (armed_.load() != kAwake) wake();
}

void Mailbox::wake() {
  if (armed_.exchange(kAwake) == kAwake) return;  // another row has
  if (!by_file_.load()) return wake_sleeper(armed_);
  const int saved_errno = errno;
  // Does not block: a full pipe is readable.
  while (write(pipe_[1], "", 1) < 0 && errno == EINTR) {
  }
  errno = saved_errno;
}

std::vector<Mailbox::Piece> Mailbox::take() {
  std::lock_guard lock(reading_);
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < rows_; row++) {
    const int64_t count = row_[row].count.load(std::memory_order_acquire);
    for (int64_t& i = row_[row].taken; i < count; i++) {
      pieces.push_back({static_cast<int32_t>(row), static_cast<int32_t>(i), records_[static_cast<size_t>(row * capacity_ + i)]});
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.record.time_ns < b.record.time_ns; });
  return pieces;
}

bool Mailbox::has_news() const {
  if (finished_.load()) return true;
  for (int64_t row = 0; row < rows_; row++) {
    if (row_[row].count.load(std::memory_order_seq_cst) > row_[row].taken) return true;
  }
  return false;
}

bool Mailbox::arm(Sleep how, bool by_file) {
  std::lock_guard lock(reading_);
  by_file_.store(by_file);
  armed_.store(how, std::memory_order_seq_cst);
  if (how == kNap ? !finished_.load() : !has_news()) return true;
  armed_.store(kAwake);
  return false;
}

int Mailbox::file() {
  if (pipe_[0] < 0) {
    if (pipe(pipe_) != 0) throw std::system_error(errno, std::generic_category(), "no pipe for a mailbox");
    for (int end : pipe_) {
      fcntl(end, F_SETFD, FD_CLOEXEC);
      fcntl(end, F_SETFL, O_NONBLOCK);
    }
  }
  return pipe_[0];
}

void Mailbox::drain() {
  char bytes[64];
  while (read(pipe_[0], bytes, sizeof(bytes)) > 0) {
  }
}

bool Mailbox::sleep(Sleep how, double seconds) {
  if (!arm(how, /*by_file=*/false)) return true;
  const bool undisturbed = sleep_while(armed_, how, seconds);
  armed_.store(kAwake);
  return undisturbed;
}

void Mailbox::wait(double seconds, double nap_seconds) {
  if (nap_seconds > 0 && !sleep(kNap, nap_seconds)) return;
  sleep(kUntilMail, seconds);
}

std::string open_mail(const int32_t* operand, int64_t batch, int64_t steps, MailRows* mail) {
  mail->rows.assign(static_cast<size_t>(batch), -1);
  for (int64_t b = 0; b < batch; b++) {
    const int32_t id = operand[2 * b], row = operand[2 * b + 1];
    if (id == 0) continue;
    if (!mail->box) mail->box = Mailbox::find(id);
    const std::string request = "request " + std::to_string(b);
    if (!mail->box) {
      return request + "'s mailbox " + std::to_string(id) +
             " does not exist in this process, or no longer; make a Mailbox for every call and keep it until the call has ended";
    }
    if (id != mail->box->id()) return "the requests of a call have different mailboxes; expected one for all of them";
    if (row < 0 || row >= mail->box->rows()) {
      return request + "'s row of the mailbox is " + std::to_string(row) + "; it has rows 0 to " + std::to_string(mail->box->rows() - 1);
    }
    if (steps > mail->box->capacity()) {
      return "the mailbox has room for " + std::to_string(mail->box->capacity()) + " tokens of a request, but this call may make " +
             std::to_string(steps);
    }
    if (!mail->box->claim(row)) {
      return request + "'s row " + std::to_string(row) + " of the mailbox is in use already; a row serves one request of one call";
    }
    mail->rows[static_cast<size_t>(b)] = row;
  }
  return "";
}

}  // namespace monokernel
