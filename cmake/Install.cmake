# What `cmake --install` gives to C++ projects, as the component `cpp`: the library, its headers, what it needs to compile
# at run time, a CMake package and a pkg-config file. Every path in them is relative to where they lie: a prefix may be
# moved. (Python's package is the component `python`.)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashcute)
set(support_dir ${CMAKE_INSTALL_LIBDIR}/flashcute)

install(TARGETS flashcute EXPORT flashcute COMPONENT cpp)
install(TARGETS flashcute_headers EXPORT flashcute_headers COMPONENT cpp)
install(DIRECTORY include/flashcute DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)

# The support folder (src/system/installation.hpp).
install(TARGETS flashcute_compiler RUNTIME DESTINATION ${support_dir} COMPONENT cpp)
install(DIRECTORY ${flashcute_device_headers_dir} DESTINATION ${support_dir} COMPONENT cpp)
install(FILES third_party/LICENSE.cutlass.txt third_party/LICENSE.cccl.txt DESTINATION ${support_dir}/include COMPONENT cpp)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT cpp)

# ---- the CMake package ----
# One file for each component of the package: the device headers need CUTLASS, the library does not.
install(EXPORT flashcute FILE flashcuteLibrary.cmake NAMESPACE flashcute:: DESTINATION ${package_dir} COMPONENT cpp)
install(EXPORT flashcute_headers FILE flashcuteHeaders.cmake NAMESPACE flashcute:: DESTINATION ${package_dir} COMPONENT cpp)
configure_package_config_file(cmake/flashcuteConfig.cmake.in flashcuteConfig.cmake
  INSTALL_DESTINATION ${package_dir} PATH_VARS support_dir NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0 a minor version may change anything.
write_basic_package_version_file(flashcuteConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashcuteConfig.cmake ${PROJECT_BINARY_DIR}/flashcuteConfigVersion.cmake
        DESTINATION ${package_dir} COMPONENT cpp)

# ---- pkg-config ----
file(RELATIVE_PATH prefix_from_pc ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
file(RELATIVE_PATH libdir_from_prefix ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH includedir_from_prefix ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
set(static_libs "")
if(NOT BUILD_SHARED_LIBS)
  set(static_libs " -pthread -ldl -lstdc++")
endif()
configure_file(cmake/flashcute.pc.in flashcute.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/flashcute.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT cpp)
