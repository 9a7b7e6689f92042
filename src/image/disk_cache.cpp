#include "image/disk_cache.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <ctime>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>

#include "flashcute/error.hpp"
#include "image/sha256.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

namespace fs = std::filesystem;

// An entry is `<key>.image`. `<key>.lock` exists while a process builds or removes it, `<key>.<16 digits>.tmp` while it
// is written. A key ends with a hash and contains no slash, so no key can name the files of another key or leave the
// folder.
constexpr std::string_view entry_suffix = ".image";
constexpr std::string_view lock_suffix = ".lock";
constexpr std::string_view temporary_suffix = ".tmp";
constexpr std::size_t key_digits = 64;        // of the hash that a key ends with
constexpr std::size_t temporary_digits = 16;  // of the random number that distinguishes writers

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  explicit operator bool() const { return fd_ >= 0; }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

std::string text_of(int error) { return std::generic_category().message(error); }

/// Whether the text ends with a dot and `count` hexadecimal digits.
bool ends_in_digits(std::string_view text, std::size_t count) {
  if (text.size() <= count || text[text.size() - count - 1] != '.') return false;
  std::string_view const digits = text.substr(text.size() - count);
  return digits.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

bool is_key(std::string_view text) {
  auto const allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
  };
  // 230 leaves room for the longest suffix within the 255 characters of a file name.
  return text.size() <= 230 && std::all_of(text.begin(), text.end(), allowed) && ends_in_digits(text, key_digits) &&
         text[0] != '.';
}

void check_key(std::string const& key) {
  if (is_key(key)) return;
  throw ArgumentError("key of a compiled image",
                      "up to 230 of the characters a-z 0-9 _ . -, not starting with . and ending with . and a SHA-256",
                      "'" + key + "'");
}

std::string file_name(std::string const& key, std::string_view suffix) { return key + std::string(suffix); }

/// The key of the file with this name and suffix; nothing if the file does not belong to the cache.
std::optional<std::string> key_of_file(std::string_view name, std::string_view suffix) {
  if (!name.ends_with(suffix)) return std::nullopt;
  name.remove_suffix(suffix.size());
  if (suffix == temporary_suffix) {
    if (!ends_in_digits(name, temporary_digits)) return std::nullopt;
    name.remove_suffix(temporary_digits + 1);
  }
  return is_key(name) ? std::optional<std::string>(name) : std::nullopt;
}

// ---- the folder ----------------------------------------------------------------------------------

/// mkdir with parents, for the owner alone. Returns 0 or errno.
int make_folder(fs::path const& folder) {
  if (mkdir(folder.c_str(), 0700) == 0 || errno == EEXIST) return 0;
  if (errno != ENOENT || !folder.has_relative_path()) return errno;
  if (int const error = make_folder(folder.parent_path()); error != 0) return error;
  return mkdir(folder.c_str(), 0700) == 0 || errno == EEXIST ? 0 : errno;
}

std::string octal(mode_t mode) {
  char text[16];
  std::snprintf(text, sizeof text, "0%o", static_cast<unsigned>(mode & 07777));
  return text;
}

bool only_we_can_write(struct stat const& s) { return s.st_uid == geteuid() && (s.st_mode & (S_IWGRP | S_IWOTH)) == 0; }

/// The open folder, or none and errno. All files are opened relative to this descriptor, so that the folder that was
/// checked is the one that is used, even if the path changes meanwhile.
Descriptor open_folder(fs::path const& folder) {
  Descriptor dir(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir) return dir;
  struct stat s;
  if (fstat(dir.get(), &s) != 0) return Descriptor();
  if (!only_we_can_write(s)) {
    throw CacheError("The folder of compiled images " + folder.string() + " belongs to user " +
                     std::to_string(s.st_uid) + " with mode " + octal(s.st_mode) +
                     ". Its images run on the GPU, so it must belong to user " + std::to_string(geteuid()) +
                     " and be writable for nobody else (mode 0700). Correct it with chown or chmod, or choose another "
                     "folder with FLASHCUTE_CACHE_DIR");
  }
  return dir;
}

/// The open folder, or none if it does not exist.
Descriptor open_existing_folder(fs::path const& folder) {
  Descriptor dir = open_folder(folder);
  if (!dir && errno != ENOENT) {
    throw CacheError("The folder of compiled images " + folder.string() + " cannot be read: " + text_of(errno));
  }
  return dir;
}

// ---- entries -------------------------------------------------------------------------------------

std::string header_of(std::string_view key, std::string_view image) {
  return "flashcute-image 1\nkey " + std::string(key) + "\nsize " + std::to_string(image.size()) + "\nsha256 " +
         sha256_hex(image) + "\n";
}

/// The image in the bytes of an entry. Its header must equal the one that key and image imply: one comparison detects
/// truncation, flipped bits, trailing bytes and the file of another key.
std::optional<std::string> image_in(std::string_view key, std::string_view entry) {
  std::size_t header_size = 0;
  for (int line = 0; line < 4; ++line) {
    std::size_t const end = entry.find('\n', header_size);
    if (end == std::string_view::npos) return std::nullopt;
    header_size = end + 1;
  }
  std::string_view const image = entry.substr(header_size);
  if (image.empty() || entry.substr(0, header_size) != header_of(key, image)) return std::nullopt;
  return std::string(image);
}

std::optional<std::string> read_entry(Descriptor const& dir, std::string const& key) {
  // NONBLOCK: opening a FIFO with the entry's name must not block. NOFOLLOW: a symbolic link is not an entry.
  int const flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  Descriptor const file(openat(dir.get(), file_name(key, entry_suffix).c_str(), flags));
  struct stat s;
  if (!file || fstat(file.get(), &s) != 0 || !S_ISREG(s.st_mode) || !only_we_can_write(s)) return std::nullopt;
  std::string entry(static_cast<std::size_t>(s.st_size), '\0');
  std::size_t size = 0;
  while (size < entry.size()) {
    ssize_t const n = read(file.get(), entry.data() + size, entry.size() - size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return std::nullopt;
    size += static_cast<std::size_t>(n);
  }
  return image_in(key, entry);
}

/// Writes everything. Returns 0 or errno.
int write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    ssize_t const n = write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  return 0;
}

/// As read_entry, and marks the entry as just used, by its modification time: other programs that read the file, such
/// as a backup, do not change it, and it works on mounts without access times. Where it cannot be set (a read-only file
/// system), nothing can be evicted either.
std::optional<std::string> use_entry(Descriptor const& dir, std::string const& key) {
  auto image = read_entry(dir, key);
  if (image) {
    timespec const times[2] = {{0, UTIME_OMIT}, {0, UTIME_NOW}};
    utimensat(dir.get(), file_name(key, entry_suffix).c_str(), times, AT_SYMLINK_NOFOLLOW);
  }
  return image;
}

std::string temporary_name(std::string const& key) {
  std::random_device random;
  char number[temporary_digits + 1];
  std::snprintf(number, sizeof number, "%08x%08x", random(), random());
  return file_name(key + "." + number, temporary_suffix);
}

/// Makes the entry appear whole or not at all. Returns 0 or errno.
int publish(fs::path const& folder, std::string const& key, std::string const& image) {
  // The folder is opened again: another process may have cleared the cache while the image was being built.
  if (int const error = make_folder(folder); error != 0) return error;
  Descriptor const dir = open_folder(folder);
  if (!dir) return errno;

  std::string const temporary = temporary_name(key);
  int const flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  Descriptor const file(openat(dir.get(), temporary.c_str(), flags, 0600));
  if (!file) return errno;
  int error = write_all(file.get(), header_of(key, image));
  if (error == 0) error = write_all(file.get(), image);
  // Without fsync a power failure may keep the rename and lose the bytes. The folder needs no fsync: if its rename is
  // lost, the entry is only absent.
  if (error == 0 && fsync(file.get()) != 0) error = errno;
  std::string const entry = file_name(key, entry_suffix);
  if (error == 0 && renameat(dir.get(), temporary.c_str(), dir.get(), entry.c_str()) != 0) error = errno;
  if (error != 0) unlinkat(dir.get(), temporary.c_str(), 0);
  return error;
}

// ---- the lock of a key ---------------------------------------------------------------------------

/// An flock on `<key>.lock`. The kernel releases it when its holder dies, and each KeyLock has its own open file, so
/// threads of one process exclude each other too. The holder removes the file before it unlocks. A process that opened
/// the file before then locks a file without a name, while another may hold a new file of the same name: so a lock
/// counts only if the name still leads to the locked file; otherwise the file is opened again.
class KeyLock {
 public:
  enum class State { held, busy, unavailable };

  KeyLock(Descriptor const& dir, std::string const& key) : dir_(dir), name_(file_name(key, lock_suffix)) {}
  KeyLock(KeyLock const&) = delete;
  KeyLock& operator=(KeyLock const&) = delete;

  // Unlocks explicitly: a child forked meanwhile shares the open file, and closing ours would not release it.
  ~KeyLock() {
    if (!held_) return;
    unlinkat(dir_.get(), name_.c_str(), 0);
    flock(file_.get(), LOCK_UN);
  }

  /// Does not wait. `unavailable`: the folder cannot be written, or the file system has no locks. Then every process
  /// builds.
  State try_acquire() {
    // Each iteration but the first means that another holder came and went just now, so there are few. The limit is for
    // file systems on which a file has another inode number at each stat, so that the name never seems to lead to it.
    for (int attempt = 0;; ++attempt) {
      if (!file_) {
        int const flags = O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
        file_ = Descriptor(openat(dir_.get(), name_.c_str(), flags, 0600));
        if (!file_) return State::unavailable;
      }
      int result = 0;
      do result = flock(file_.get(), LOCK_EX | LOCK_NB);
      while (result != 0 && errno == EINTR);
      State const state = result == 0 ? State::held : errno == EWOULDBLOCK ? State::busy : State::unavailable;
      if (attempt == 100 || has_its_name()) {
        held_ = state == State::held;
        return state;
      }
      if (state == State::held) flock(file_.get(), LOCK_UN);
      file_ = Descriptor();
    }
  }

 private:
  bool has_its_name() const {
    struct stat locked, named;
    return fstat(file_.get(), &locked) == 0 && fstatat(dir_.get(), name_.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 &&
           locked.st_dev == named.st_dev && locked.st_ino == named.st_ino;
  }

  Descriptor const& dir_;
  std::string name_;
  Descriptor file_;
  bool held_ = false;
};

// ---- what is in the folder -----------------------------------------------------------------------

using Entry = DiskCache::Entry;
using Outcome = DiskCache::Outcome;

struct Contents {
  std::vector<Entry> entries;                                          // the most recently used first
  std::vector<std::string> locks;                                      // keys
  std::vector<std::pair<std::string, std::string>> stale_temporaries;  // key and name of the file
};

std::int64_t nanoseconds(timespec const& t) { return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec; }

/// Files that vanish meanwhile are left out.
Contents contents_of(Descriptor const& dir) {
  Contents found;
  // A second open file of the folder, because reading it moves its position.
  Descriptor copy(openat(dir.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  std::unique_ptr<DIR, int (*)(DIR*)> const list(copy ? fdopendir(copy.get()) : nullptr, closedir);
  if (!list) return found;
  copy.release();
  // A live writer needs milliseconds. Its process id would be meaningless if hosts share the folder, so the age
  // decides.
  std::time_t const an_hour_ago = std::time(nullptr) - 3600;
  while (dirent const* file = readdir(list.get())) {
    std::string_view const name = file->d_name;
    struct stat s;
    auto const is_plain_file = [&] {
      return fstatat(dir.get(), file->d_name, &s, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(s.st_mode);
    };
    if (auto key = key_of_file(name, entry_suffix)) {
      if (is_plain_file()) {
        found.entries.push_back({*std::move(key), static_cast<std::uint64_t>(s.st_size), nanoseconds(s.st_mtim)});
      }
    } else if (auto lock = key_of_file(name, lock_suffix)) {
      found.locks.push_back(*std::move(lock));
    } else if (auto temporary = key_of_file(name, temporary_suffix)) {
      if (!is_plain_file() || s.st_mtime > an_hour_ago) continue;
      found.stale_temporaries.emplace_back(*std::move(temporary), name);
    }
  }
  std::sort(found.entries.begin(), found.entries.end(),
            [](Entry const& a, Entry const& b) { return std::tie(b.last_used, a.key) < std::tie(a.last_used, b.key); });
  return found;
}

/// Removes a file of the key, but not while another process holds its lock; with `only_damaged`, not if the entry is
/// whole. A process that reads the file at this moment has it open and is not disturbed.
Outcome remove_file(Descriptor const& dir, std::string const& key, std::string const& name, bool only_damaged = false) {
  KeyLock lock(dir, key);
  bool const busy = lock.try_acquire() == KeyLock::State::busy;
  // Only under the lock: before, a builder could have replaced a damaged entry by a good one.
  if (only_damaged && read_entry(dir, key)) return Outcome::whole;
  if (busy) return Outcome::in_use;
  if (unlinkat(dir.get(), name.c_str(), 0) == 0) return Outcome::removed;
  return errno == ENOENT ? Outcome::vanished : Outcome::failed;
}

Outcome remove_entry(Descriptor const& dir, Entry const& entry, bool only_damaged = false) {
  return remove_file(dir, entry.key, file_name(entry.key, entry_suffix), only_damaged);
}

/// Removes what killed processes left: temporary files, and lock files that no process holds.
void remove_remains(Descriptor const& dir, Contents const& found) {
  for (auto const& [key, name] : found.stale_temporaries) remove_file(dir, key, name);
  for (std::string const& key : found.locks) KeyLock(dir, key).try_acquire();  // its destructor removes the file
}

// ---- building ------------------------------------------------------------------------------------

std::string run_build(std::string const& key, std::function<std::string()> const& build, bool* built) {
  if (built != nullptr) *built = true;
  std::string image = build();
  if (image.empty()) throw CompileError("The build of " + key + " returned an empty image");
  return image;
}

/// Prints the warning once per process; other threads wait until it is printed.
void report_unwritable(fs::path const& folder, int error) {
  static std::once_flag reported;
  if (quiet()) return;
  std::call_once(reported, [&] {
    std::string const where = folder.empty() ? "without a home folder" : "in " + folder.string();
    std::fprintf(stderr,
                 "flashcute: compiled images cannot be kept %s (%s): each process will compile them again; "
                 "FLASHCUTE_CACHE_DIR names another folder\n",
                 where.c_str(), text_of(error).c_str());
  });
}

}  // namespace

DiskCache::DiskCache(fs::path folder, std::uint64_t limit, std::chrono::milliseconds patience)
    : folder_(std::move(folder)), limit_(limit), patience_(patience) {}

std::optional<std::string> DiskCache::find(std::string const& key) const {
  check_key(key);
  Descriptor const dir = open_folder(folder_);
  return dir ? use_entry(dir, key) : std::nullopt;
}

bool DiskCache::has(std::string const& key) const {
  check_key(key);
  Descriptor const dir = open_folder(folder_);
  return dir && faccessat(dir.get(), file_name(key, entry_suffix).c_str(), R_OK, 0) == 0;
}

std::string DiskCache::get_or_build(std::string const& key, std::function<std::string()> const& build,
                                    bool* built) const {
  check_key(key);
  if (built != nullptr) *built = false;
  if (auto image = find(key)) return *image;  // before anything is written: the folder may be read-only

  int error = make_folder(folder_);
  Descriptor const dir = error == 0 ? open_folder(folder_) : Descriptor();
  if (!dir) {
    if (error == 0) error = errno;
    report_unwritable(folder_, error);
    return run_build(key, build, built);
  }

  std::string image;
  {
    KeyLock lock(dir, key);
    auto const deadline = std::chrono::steady_clock::now() + patience_;
    std::chrono::milliseconds pause(1);
    while (lock.try_acquire() == KeyLock::State::busy && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(pause);
      pause = std::min(2 * pause, std::chrono::milliseconds(50));
      if (auto published = use_entry(dir, key)) return *published;
    }
    // The previous holder may have published between the last look and this lock.
    if (auto published = use_entry(dir, key)) return *published;

    image = run_build(key, build, built);
    error = publish(folder_, key, image);
  }
  if (error != 0) report_unwritable(folder_, error);
  tidy(key);
  return image;
}

/// Removes what killed processes left, and the least recently used entries until the rest fits the limit, but never the
/// one that was just published. Never waits and never fails: whatever goes wrong here, the caller has its image.
void DiskCache::tidy(std::string const& published) const try {
  Descriptor const dir = open_folder(folder_);  // opened again, as in publish
  if (!dir) return;
  Contents const found = contents_of(dir);
  remove_remains(dir, found);
  std::uint64_t total = 0;
  for (Entry const& entry : found.entries) total += entry.size;
  for (auto entry = found.entries.rbegin(); entry != found.entries.rend() && total > limit_; ++entry) {
    if (entry->key == published) continue;
    Outcome const outcome = remove_entry(dir, *entry);
    if (outcome == Outcome::removed || outcome == Outcome::vanished) total -= entry->size;
  }
} catch (std::exception const&) {
}

std::vector<DiskCache::Entry> DiskCache::entries() const {
  Descriptor const dir = open_existing_folder(folder_);
  return dir ? contents_of(dir).entries : std::vector<Entry>();
}

DiskCache::Outcomes DiskCache::check() const {
  Outcomes outcomes;
  Descriptor const dir = open_existing_folder(folder_);
  if (!dir) return outcomes;
  Contents found = contents_of(dir);
  for (Entry& entry : found.entries) {
    Outcome const outcome = remove_entry(dir, entry, /*only_damaged=*/true);
    outcomes.emplace_back(std::move(entry), outcome);
  }
  return outcomes;
}

DiskCache::Outcomes DiskCache::clear() const {
  Outcomes outcomes;
  Descriptor const dir = open_existing_folder(folder_);
  if (!dir) return outcomes;
  Contents found = contents_of(dir);
  remove_remains(dir, found);
  for (Entry& entry : found.entries) {
    Outcome const outcome = remove_entry(dir, entry);
    outcomes.emplace_back(std::move(entry), outcome);
  }
  return outcomes;
}

}  // namespace flashcute
