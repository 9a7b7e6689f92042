// In place of flashcute_compiler: does what the test says in the request's first option.
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>

#include "image/message.hpp"

extern char** environ;

int main() {
  using namespace flashcute;
  std::string const text(std::istreambuf_iterator<char>(std::cin), {});
  auto const request = unpacked(text).value();
  auto const options = unpacked(request.at(4)).value();
  std::string const what = options.empty() ? "" : options[0];
  if (what == "crash") {
    std::cerr << "the compiler's last words\n";
    kill(getpid(), SIGSEGV);
  }
  if (what == "killed") kill(getpid(), SIGKILL);
  if (what == "half an answer") {
    std::cout << packed({"image", std::string(1000, 'x')}).substr(0, 500);
    return 3;
  }
  if (what == "cannot start") {
    std::cerr << "error while loading shared libraries: libsomething.so\n";
    return 127;
  }
  std::string seen;
  if (what == "variables") {
    for (char** entry = environ; *entry != nullptr; ++entry) seen += std::string(*entry) + "\n";
  }
  if (what == "signals") {
    sigset_t blocked;
    sigprocmask(SIG_SETMASK, nullptr, &blocked);
    seen = std::to_string(sigismember(&blocked, SIGTERM));
    for (int const signal : {SIGPIPE, SIGINT, SIGHUP}) {
      struct sigaction action;
      sigaction(signal, nullptr, &action);
      seen += action.sa_handler == SIG_DFL ? " default" : " ignored";
    }
  }
  std::cout << packed({"image",
                       "\x7f"
                       "ELF" +
                           seen + request.at(1)});
}
