# Finds the headers that device code includes, one pinned version everywhere:
#   flashcute_cutlass_dir   CUTLASS 4.2 (CuTe)
#   flashcute_cccl_dir      CCCL 13.0 (libcu++), which CuTe includes; for run-time compilation
# Each comes from a given folder, else an installed package, else (CCCL) the CUDA toolkit, else the
# package is fetched by hash. Packages are only unpacked: their Python dependencies stay away.

set(FLASHCUTE_CCCL_DIR "" CACHE PATH "Folder of CCCL 13.0's headers, holding cuda/ and nv/ (default: found or fetched)")

# Unpacks a pinned wheel below the build folder and sets `folder` to a path inside it. `hashes` lists the
# SHA-256 of each platform's file.
function(flashcute_fetch_wheel requirement hashes inside folder)
  string(REGEX REPLACE "[^A-Za-z0-9.]" "_" name ${requirement})
  set(target ${PROJECT_BINARY_DIR}/_packages/${name})
  if(NOT EXISTS ${target}/${inside})
    message(STATUS "flashcute: fetching ${requirement}")
    file(MAKE_DIRECTORY ${target})
    list(TRANSFORM hashes PREPEND " --hash=sha256:" OUTPUT_VARIABLE allowed)
    list(JOIN allowed "" allowed)
    file(WRITE ${target}/requirements.txt "${requirement}${allowed}\n")
    execute_process(
      COMMAND ${Python_EXECUTABLE} -m pip download --quiet --no-deps --only-binary=:all: --require-hashes
              --disable-pip-version-check --dest ${target} --requirement ${target}/requirements.txt
      RESULT_VARIABLE failed ERROR_VARIABLE error)
    if(failed)
      message(STATUS "flashcute: ${requirement} could not be fetched: ${error}")
      return()
    endif()
    file(GLOB wheel ${target}/*.whl)
    file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${target}/unpacking PATTERNS "${inside}*")
    file(REMOVE ${wheel})
    # Complete or not there: an interrupted extraction must not pass for the package.
    get_filename_component(parent ${target}/${inside} DIRECTORY)
    file(MAKE_DIRECTORY ${parent})
    file(RENAME ${target}/unpacking/${inside} ${target}/${inside})
  endif()
  set(${folder} ${target}/${inside} PARENT_SCOPE)
endfunction()

# Sets `folder` to `inside` of an installed package of exactly that version, without importing it.
function(flashcute_installed_package package version inside folder)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "
import importlib.metadata as m, sys
d = m.distribution('${package}')
sys.exit(1) if d.version != '${version}' else print(d.locate_file('${inside}'), end='')"
    RESULT_VARIABLE failed OUTPUT_VARIABLE found ERROR_QUIET)
  if(NOT failed AND EXISTS ${found})
    set(${folder} ${found} PARENT_SCOPE)
  endif()
endfunction()

# ---- CUTLASS ----
set(flashcute_cutlass_dir ${FLASHCUTE_CUTLASS_DIR})
if(NOT flashcute_cutlass_dir)
  flashcute_installed_package(nvidia-cutlass 4.2.0.0 cutlass_library/source/include flashcute_cutlass_dir)
endif()
if(NOT flashcute_cutlass_dir)
  flashcute_fetch_wheel(nvidia-cutlass==4.2.0.0 f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6
    cutlass_library/source/include flashcute_cutlass_dir)
endif()
if(NOT flashcute_cutlass_dir)
  message(FATAL_ERROR "flashcute needs CUTLASS 4.2's headers: install nvidia-cutlass==4.2.0.0 or set FLASHCUTE_CUTLASS_DIR")
endif()
file(STRINGS ${flashcute_cutlass_dir}/cutlass/version.h version REGEX "define CUTLASS_(MAJOR|MINOR) ")
string(REGEX REPLACE "[^0-9]+" "." version "${version}")
set(flashcute_cutlass_version 4.2)
if(NOT version STREQUAL ".${flashcute_cutlass_version}")
  message(FATAL_ERROR "flashcute needs CUTLASS ${flashcute_cutlass_version}; ${flashcute_cutlass_dir} has version ${version}")
endif()
message(STATUS "flashcute: CUTLASS in ${flashcute_cutlass_dir}")
set(flashcute_cutlass_found ${flashcute_cutlass_dir} CACHE INTERNAL "for tools/compile_cost.py")

# ---- CCCL ----
set(flashcute_cccl_dir ${FLASHCUTE_CCCL_DIR})
if(NOT flashcute_cccl_dir)
  flashcute_installed_package(nvidia-cuda-cccl 13.0.85 nvidia/cu13/include/cccl flashcute_cccl_dir)
endif()
if(NOT flashcute_cccl_dir)
  find_path(flashcute_toolkit_cccl cuda/std/version
    PATHS ${flashcute_cuda_homes} PATH_SUFFIXES include/cccl NO_DEFAULT_PATH)
  if(flashcute_toolkit_cccl)
    # CuTe 4.2 compiles under NVRTC with CCCL 3.0 and 3.1 (CUDA 13.0 and 13.1), not with later ones.
    file(STRINGS ${flashcute_toolkit_cccl}/cuda/std/__cccl/version.h version REGEX "define CCCL_VERSION ")
    if(version MATCHES "300[01]...$")
      set(flashcute_cccl_dir ${flashcute_toolkit_cccl})
    endif()
  endif()
endif()
if(NOT flashcute_cccl_dir)
  flashcute_fetch_wheel(nvidia-cuda-cccl==13.0.85 "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649;6f0203e29fed809ee2b7fe9b1344df66ecab990c37d6a2e0e189b26d6c97ed7c"
    nvidia/cu13/include/cccl flashcute_cccl_dir)
endif()
if(NOT flashcute_cccl_dir)
  message(FATAL_ERROR "flashcute needs CCCL 13.0's headers: install nvidia-cuda-cccl==13.0.85 or set FLASHCUTE_CCCL_DIR")
endif()
message(STATUS "flashcute: CCCL in ${flashcute_cccl_dir}")
