# One folder is one target: kvant_library(NAME <folder> ...) makes the library kvant::<folder> and, in
# development builds, the test program kvant_<folder>_tests from the *_test.cc beside the sources.
include_guard()

add_library(kvant_options INTERFACE)
target_compile_features(kvant_options INTERFACE cxx_std_20)
# Codecs are bit-exact by definition (codecs.md): one fp32 operation is one rounding, everywhere.
target_compile_options(kvant_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>
                       $<$<COMPILE_LANGUAGE:CUDA>:${KVANT_CUDA_FLAGS}>)
if(KVANT_DEV)
  set(warnings -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Wnon-virtual-dtor)
  if(NOT KVANT_SANITIZE)  # instrumented code makes g++ warn about overflows and values that are not there
    list(APPEND warnings -Werror)
  endif()
  target_compile_options(kvant_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${warnings}>")
endif()
if(KVANT_SANITIZE)
  target_compile_options(kvant_options INTERFACE -fsanitize=${KVANT_SANITIZE} -fno-omit-frame-pointer
                         -fno-sanitize-recover=all)
  target_link_options(kvant_options INTERFACE -fsanitize=${KVANT_SANITIZE})
endif()
if(KVANT_FUZZ)
  target_compile_options(kvant_options INTERFACE -fsanitize=fuzzer-no-link)  # coverage for libFuzzer
endif()
target_link_libraries(kvant_options INTERFACE Threads::Threads)

# Kernels read what their callers have made, and are inlined in themselves a hundred times over: with
# these checks they would be 40 % of an instrumented build's time. Every access to memory is still checked.
set(KVANT_FLAGS_sanitized_kernels "")
if(KVANT_SANITIZE MATCHES "address")
  set(KVANT_FLAGS_sanitized_kernels -fno-sanitize=null,alignment,object-size,pointer-overflow
      -fno-sanitize-address-use-after-scope)
endif()

set(KVANT_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2 ${KVANT_FLAGS_sanitized_kernels})
set(KVANT_FLAGS_avx512 ${KVANT_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2
    -mavx512vnni -mavx512bf16 -mprefer-vector-width=512
    # GCC 12 takes the deliberately undefined operands in its own AVX-512 headers for a mistake.
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>
    # With it GCC 12 copies every sum of a register tile twice a step, and some to memory.
    $<$<CXX_COMPILER_ID:GNU>:-fno-tree-pre>)

set(KVANT_FLAGS_amx ${KVANT_FLAGS_avx512} -mavx512fp16 -mamx-tile -mamx-int8 -mamx-bf16)

function(kvant_library)
  cmake_parse_arguments(ARG "" "NAME" "HEADERS;SOURCES;AVX2;AVX512;AMX;CUDA;CUDA_SM90A;DEPS;LINK;TESTS;TEST_DEPS" ${ARGN})
  set(target kvant_${ARG_NAME})
  add_library(${target} STATIC ${ARG_SOURCES} ${ARG_AVX2} ${ARG_AVX512} ${ARG_AMX})
  add_library(kvant::${ARG_NAME} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${ARG_NAME})
  if(ARG_HEADERS)
    target_sources(${target} PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR}
                   FILES ${ARG_HEADERS})
  endif()
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:kvant_options>)
  foreach(dep IN LISTS ARG_DEPS)
    target_link_libraries(${target} PUBLIC kvant::${dep})
  endforeach()
  if(ARG_LINK)
    target_link_libraries(${target} PRIVATE ${ARG_LINK})
  endif()
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set_source_files_properties(${ARG_AVX2} PROPERTIES COMPILE_OPTIONS "${KVANT_FLAGS_avx2}")
    set_source_files_properties(${ARG_AVX512} PROPERTIES COMPILE_OPTIONS "${KVANT_FLAGS_avx512}")
    set_source_files_properties(${ARG_AMX} PROPERTIES COMPILE_OPTIONS "${KVANT_FLAGS_amx}")
  endif()
  if(KVANT_CUDA AND ARG_CUDA)
    target_sources(${target} PRIVATE ${ARG_CUDA})
    target_compile_definitions(${target} PRIVATE KVANT_CUDA)
    target_link_libraries(${target} PRIVATE CUDA::cudart_static CUDA::cublasLt)
    # Instructions that no other GPU has, whatever the rest is compiled for.
    add_library(${target}_sm90a OBJECT ${ARG_CUDA_SM90A})
    set_target_properties(${target}_sm90a PROPERTIES CUDA_ARCHITECTURES 90a)
    target_include_directories(${target}_sm90a PRIVATE ${PROJECT_SOURCE_DIR})
    target_link_libraries(${target}_sm90a PRIVATE kvant_options)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_sm90a>)
  endif()
  if(KVANT_DEV AND ARG_TESTS)
    kvant_test(NAME ${ARG_NAME} SOURCES ${ARG_TESTS} DEPS ${ARG_NAME} ${ARG_TEST_DEPS})
  endif()
  set_property(GLOBAL APPEND PROPERTY KVANT_LIBRARIES ${target})
endfunction()

# kvant_test(NAME n SOURCES ... DEPS folder... LINK lib...) makes the program kvant_<n>_tests.
function(kvant_test)
  cmake_parse_arguments(ARG "" "NAME" "SOURCES;DEPS;LINK" ${ARGN})
  set(target kvant_${ARG_NAME}_tests)
  add_executable(${target} ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE kvant_options GTest::gtest GTest::gtest_main ${ARG_LINK})
  foreach(dep IN LISTS ARG_DEPS)
    target_link_libraries(${target} PRIVATE kvant::${dep})
  endforeach()
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  # Whole programs, not single cases: start-up dominates thousands of small cases.
  add_test(NAME ${ARG_NAME} COMMAND ${target} --gtest_brief=1)
  # scripts/count_tests.py sums the cases of these reports.
  set_tests_properties(${ARG_NAME} PROPERTIES ENVIRONMENT
                       GTEST_OUTPUT=xml:${CMAKE_BINARY_DIR}/test-results/${ARG_NAME}.xml)
endfunction()
