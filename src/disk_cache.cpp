#include "disk_cache.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <ctime>
#include <random>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "environment.hpp"
#include "flashcute/error.hpp"
#include "sha256.hpp"

namespace flashcute {
namespace {

namespace fs = std::filesystem;

// An entry is `<key>.image`, with its lock beside it. The suffixes are fixed and a key has no slash, so no key can name
// another key's files or leave the folder.
constexpr char const* entry_suffix = ".image";
constexpr char const* lock_suffix = ".lock";
constexpr char const* temporary_suffix = ".tmp";

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  explicit operator bool() const { return fd_ >= 0; }
  int get() const { return fd_; }

 private:
  int fd_;
};

std::string text_of(int error) { return std::generic_category().message(error); }

void check_key(std::string const& key) {
  auto const allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
  };
  // 200 leaves room for the longest suffix within the 255 characters of a file name.
  if (key.empty() || key.size() > 200 || key[0] == '.' || !std::all_of(key.begin(), key.end(), allowed)) {
    throw ArgumentError("key of a compiled image", "1 to 200 of the characters a-z 0-9 _ . -, not starting with .",
                        "'" + key + "'");
  }
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

/// The open folder, or none and errno. All files are opened relative to this descriptor, so that what was checked here
/// is what is used, whatever happens to the path meanwhile.
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

// ---- entries -------------------------------------------------------------------------------------

std::string header_of(std::string_view key, std::string_view image) {
  return "flashcute-image 1\nkey " + std::string(key) + "\nsize " + std::to_string(image.size()) + "\nsha256 " +
         sha256_hex(image) + "\n";
}

/// The image in the bytes of an entry. The header is what the key and the image say it must be, to the letter: hence
/// truncation, flipped bits, trailing bytes and another key's file all show in one comparison.
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
  // NONBLOCK: a fifo in the entry's place must not stop us. NOFOLLOW: a symbolic link is not an entry.
  int const flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  Descriptor const file(openat(dir.get(), (key + entry_suffix).c_str(), flags));
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

/// Removes what writers left behind that died between writing and renaming. A live one needs milliseconds; its process
/// id says nothing where hosts share the folder, so the age decides.
void remove_stale_temporaries(Descriptor const& dir) {
  int const fd = openat(dir.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const list = fd < 0 ? nullptr : fdopendir(fd);
  if (list == nullptr) {
    if (fd >= 0) close(fd);
    return;
  }
  std::time_t const an_hour_ago = std::time(nullptr) - 3600;
  while (dirent const* entry = readdir(list)) {
    struct stat s;
    if (!std::string_view(entry->d_name).ends_with(temporary_suffix)) continue;
    if (fstatat(dir.get(), entry->d_name, &s, AT_SYMLINK_NOFOLLOW) != 0 || s.st_mtime > an_hour_ago) continue;
    unlinkat(dir.get(), entry->d_name, 0);
  }
  closedir(list);
}

std::string temporary_name(std::string const& key) {
  std::random_device random;
  char text[64];
  std::snprintf(text, sizeof text, ".%ld.%08x%08x", static_cast<long>(getpid()), random(), random());
  return key + text + temporary_suffix;
}

/// Makes the entry appear whole or not at all. Returns 0 or errno.
int publish(fs::path const& folder, std::string const& key, std::string const& image) {
  // The folder is opened again: somebody may have cleared the cache while the image was being built.
  if (int const error = make_folder(folder); error != 0) return error;
  Descriptor const dir = open_folder(folder);
  if (!dir) return errno;
  remove_stale_temporaries(dir);

  std::string const temporary = temporary_name(key);
  int const flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  Descriptor const file(openat(dir.get(), temporary.c_str(), flags, 0600));
  if (!file) return errno;
  int error = write_all(file.get(), header_of(key, image));
  if (error == 0) error = write_all(file.get(), image);
  // Without fsync a power cut may keep the rename and lose the bytes. The folder itself needs none: an entry whose
  // rename was lost is only absent.
  if (error == 0 && fsync(file.get()) != 0) error = errno;
  std::string const entry = key + entry_suffix;
  if (error == 0 && renameat(dir.get(), temporary.c_str(), dir.get(), entry.c_str()) != 0) error = errno;
  if (error != 0) unlinkat(dir.get(), temporary.c_str(), 0);
  return error;
}

// ---- the lock of a key ---------------------------------------------------------------------------

/// An flock on `<key>.lock`. The kernel drops it when its holder dies, and each KeyLock has its own open file, so
/// threads of one process exclude each other too. The file stays: removing it would let a second holder lock a new
/// file of the same name beside the first.
class KeyLock {
 public:
  enum class State { held, busy, unavailable };

  KeyLock(Descriptor const& dir, std::string const& key)
      : file_(openat(dir.get(), (key + lock_suffix).c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600)) {}

  // Unlocks by name: a child forked meanwhile shares the open file, and closing ours would not release it.
  ~KeyLock() {
    if (file_) flock(file_.get(), LOCK_UN);
  }

  /// `unavailable`: a folder that cannot be written, or a file system without locks. Then everybody builds.
  State try_acquire() const {
    if (!file_) return State::unavailable;
    int result = 0;
    do result = flock(file_.get(), LOCK_EX | LOCK_NB);
    while (result != 0 && errno == EINTR);
    return result == 0 ? State::held : errno == EWOULDBLOCK ? State::busy : State::unavailable;
  }

 private:
  Descriptor file_;
};

// ---- building ------------------------------------------------------------------------------------

std::string run_build(std::string const& key, std::function<std::string()> const& build, bool* built) {
  if (built != nullptr) *built = true;
  std::string image = build();
  if (image.empty()) throw CompileError("The build of " + key + " returned an empty image");
  return image;
}

void report_unwritable(fs::path const& folder, int error) {
  static std::atomic<bool> reported = false;
  if (quiet() || reported.exchange(true)) return;
  std::string const where = folder.empty() ? "without a home folder" : "in " + folder.string();
  std::fprintf(stderr,
               "flashcute: compiled images cannot be kept %s (%s): each process will compile them again; "
               "FLASHCUTE_CACHE_DIR names another folder\n",
               where.c_str(), text_of(error).c_str());
}

}  // namespace

DiskCache::DiskCache(fs::path folder, std::chrono::milliseconds patience)
    : folder_(std::move(folder)), patience_(patience) {}

std::optional<std::string> DiskCache::find(std::string const& key) const {
  check_key(key);
  Descriptor const dir = open_folder(folder_);
  return dir ? read_entry(dir, key) : std::nullopt;
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

  KeyLock const lock(dir, key);
  auto const deadline = std::chrono::steady_clock::now() + patience_;
  std::chrono::milliseconds pause(1);
  while (lock.try_acquire() == KeyLock::State::busy && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, std::chrono::milliseconds(50));
    if (auto image = read_entry(dir, key)) return *image;
  }
  // The holder before us may have published between our last look and our lock.
  if (auto image = read_entry(dir, key)) return *image;

  std::string image = run_build(key, build, built);
  error = publish(folder_, key, image);
  if (error != 0) report_unwritable(folder_, error);
  return image;
}

}  // namespace flashcute
