# Every package that kvant uses, found once for all folders. docs/dependencies.md says what each is for;
# cmake/kvantConfig.cmake.in repeats those that the installed libraries need at link time.
include_guard()
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
find_package(Boost 1.74 REQUIRED)  # headers: Beast and Asio
pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET GLOBAL libutf8proc)
pkg_check_modules(xxhash REQUIRED IMPORTED_TARGET GLOBAL libxxhash)
pkg_check_modules(hiredis REQUIRED IMPORTED_TARGET GLOBAL hiredis)
pkg_check_modules(libzmq REQUIRED IMPORTED_TARGET GLOBAL libzmq)
find_path(KVANT_CPPZMQ_INCLUDE zmq.hpp REQUIRED)
find_path(KVANT_MSGPACK_INCLUDE msgpack.hpp REQUIRED)
if(KVANT_DEV)
  find_package(GTest REQUIRED)
endif()
