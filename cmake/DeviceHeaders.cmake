# The include closure of the entry headers in one folder, from which run-time compilation reads and which the
# wheel ships: flashcute/, cute/, cutlass/ at the top, CCCL below cccl/.
set(flashcute_device_headers_dir ${PROJECT_BINARY_DIR}/device_headers/include)
set(stamp ${PROJECT_BINARY_DIR}/device_headers/include.stamp)
file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/device_headers)
add_custom_command(
  OUTPUT ${stamp}
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/collect_headers.py
          --output ${flashcute_device_headers_dir} --depfile ${stamp}.d
          --start flashcute/sm80/entry.hpp flashcute/sm90/entry.hpp flashcute/sm90/backward_entry.hpp
                  flashcute/device/make_block_map.hpp
          --root ${PROJECT_SOURCE_DIR}/include ${flashcute_cutlass_dir} cccl=${flashcute_cccl_dir}
  DEPENDS ${PROJECT_SOURCE_DIR}/cmake/collect_headers.py
  DEPFILE ${stamp}.d
  COMMENT "Collecting the headers for run-time compilation"
  VERBATIM)
add_custom_target(flashcute_device_headers ALL DEPENDS ${stamp})
