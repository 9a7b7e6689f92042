# Compiles each family of src/image/kernels.def into one fatbin and embeds it into the library. One front-end
# pass for compute_80 serves all targets: assembling for several costs what one costs. The families of sm90 use
# instructions that exist for sm_90a alone; without architecture 90 their images are empty.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS src/image/kernels.def)
file(STRINGS src/image/kernels.def lines REGEX "^FLASHCUTE_(FORWARD|BACKWARD|BLOCK_MAP)_FAMILY")
set(flashcute_families "")
foreach(line ${lines})
  string(REGEX REPLACE "^[A-Z_]+\\(([a-z0-9_]+).*" "\\1" family ${line})
  list(APPEND flashcute_families ${family})
endforeach()

find_program(FLASHCUTE_NVCC nvcc PATHS ${flashcute_cuda_homes} PATH_SUFFIXES bin NO_DEFAULT_PATH)
if(NOT FLASHCUTE_CUDA_HOME)
  find_program(FLASHCUTE_NVCC nvcc)
endif()
set(flashcute_with_images OFF)
if(FLASHCUTE_IMAGES STREQUAL "OFF" OR NOT FLASHCUTE_ARCHS)
  set(why "FLASHCUTE_IMAGES=OFF")
elseif(NOT FLASHCUTE_NVCC)
  set(why "no nvcc was found")
  if(FLASHCUTE_IMAGES STREQUAL "ON")
    message(FATAL_ERROR "FLASHCUTE_IMAGES=ON, but ${why}: install a CUDA toolkit 12.8 or later, or set FLASHCUTE_CUDA_HOME")
  endif()
else()
  execute_process(COMMAND ${FLASHCUTE_NVCC} --version OUTPUT_VARIABLE version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE ".*V([0-9]+\\.[0-9]+\\.[0-9]+).*" "\\1" flashcute_nvcc_version "${version}")
  if(flashcute_nvcc_version VERSION_LESS 12.8)
    message(FATAL_ERROR "flashcute needs nvcc 12.8 or later to compile images, ${FLASHCUTE_NVCC} is "
                        "${flashcute_nvcc_version}; FLASHCUTE_IMAGES=OFF builds without")
  endif()
  set(flashcute_with_images ON)
endif()

if(NOT flashcute_with_images)
  message(WARNING "flashcute: built WITHOUT kernel images (${why}). The CPU backend works; on a GPU kernels are "
                  "compiled at first use, which needs NVRTC: ${flashcute_install_command}")
  target_compile_definitions(flashcute PRIVATE FLASHCUTE_WITH_IMAGES=0)
  return()
endif()
message(STATUS "flashcute: images of ${flashcute_families} for ${FLASHCUTE_ARCHS} by nvcc ${flashcute_nvcc_version}")

# "80;90;80-ptx" -> sm_80,sm_90,compute_80
set(targets "")
foreach(arch ${FLASHCUTE_ARCHS})
  if(arch MATCHES "^([0-9]+)-ptx$")
    list(APPEND targets compute_${CMAKE_MATCH_1})
  elseif(arch MATCHES "^[0-9]+$")
    list(APPEND targets sm_${arch})
  else()
    message(FATAL_ERROR "FLASHCUTE_ARCHS: expected numbers such as 80 or 80-ptx, got '${arch}'")
  endif()
endforeach()
list(JOIN targets "," targets)
list(JOIN FLASHCUTE_ARCHS " " archs)

# The tool that prints a family's translation unit; it shares names with the library through config.hpp.
add_executable(flashcute_generate_unit src/image/generate_unit.cpp src/image/source.cpp)
target_include_directories(flashcute_generate_unit PRIVATE include src)

set(flashcute_images_dir ${PROJECT_BINARY_DIR}/images)
file(MAKE_DIRECTORY ${flashcute_images_dir})
foreach(family ${flashcute_families})
  set(gencode "arch=compute_80,code=[${targets}]")
  if(family MATCHES "_sm90_")
    set(gencode "arch=compute_90a,code=sm_90a")
  endif()
  set(unit ${flashcute_images_dir}/${family}.cu)
  set(image ${flashcute_images_dir}/${family}.fatbin)
  # Rewritten only when its text changes, so that rebuilding the tool does not recompile the images.
  add_custom_command(
    OUTPUT ${unit}
    COMMAND ${CMAKE_COMMAND} -DTOOL=$<TARGET_FILE:flashcute_generate_unit> -DFAMILY=${family} -DUNIT=${unit}
            -P ${PROJECT_SOURCE_DIR}/cmake/write_unit.cmake
    DEPENDS flashcute_generate_unit
    COMMENT "Generating ${family}.cu"
    VERBATIM)
  add_custom_command(
    OUTPUT ${image}
    COMMAND ${CMAKE_COMMAND} -P ${PROJECT_SOURCE_DIR}/cmake/compile_image.cmake --
            ${FLASHCUTE_NVCC} -fatbin -std=c++20 -O3 -Xptxas -O${FLASHCUTE_PTXAS_LEVEL} -DNDEBUG "-gencode=${gencode}"
            -I${PROJECT_SOURCE_DIR}/include -I${flashcute_cutlass_dir} -MD -MF ${image}.d -MT ${image}
            -o ${image} ${unit}
    DEPENDS ${unit} ${PROJECT_SOURCE_DIR}/cmake/compile_image.cmake
    DEPFILE ${image}.d
    COMMENT "Compiling images of ${family}"
    VERBATIM)
  set(embedding ${flashcute_images_dir}/${family}_image.cpp)
  set(content ".incbin \"${image}\"")
  if(family MATCHES "_sm90_" AND NOT "90" IN_LIST FLASHCUTE_ARCHS)
    set(content "")
  endif()
  file(CONFIGURE OUTPUT ${embedding} CONTENT [=[
// Generated. The image of family @family@ between two symbols.
asm(R"(
    .section .rodata
    .balign 64
    .global flashcute_image_@family@
    .global flashcute_image_@family@_end
    .hidden flashcute_image_@family@
    .hidden flashcute_image_@family@_end
flashcute_image_@family@:
    @content@
flashcute_image_@family@_end:
    .previous
)");
]=] @ONLY)
  if(content)
    set_source_files_properties(${embedding} PROPERTIES OBJECT_DEPENDS ${image})
  endif()
  target_sources(flashcute PRIVATE ${embedding})
endforeach()
target_compile_definitions(flashcute PRIVATE
  FLASHCUTE_WITH_IMAGES=1 FLASHCUTE_IMAGE_ARCHS="${archs}" FLASHCUTE_NVCC_VERSION="${flashcute_nvcc_version}")
