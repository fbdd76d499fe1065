# Writes a C++ source that holds a file's bytes:
#   cmake -DINPUT=file -DOUTPUT=source.cc -DNAME=novel -P embed_text.cmake
# defines `const unsigned char kvant_embedded_novel[]` and `kvant_embedded_novel_size`.
file(READ "${INPUT}" hex HEX)
string(REGEX REPLACE "(................................)" "\\1\n" hex "${hex}")
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
file(WRITE "${OUTPUT}" "#include <cstddef>\n\
extern const unsigned char kvant_embedded_${NAME}[];\n\
extern const std::size_t kvant_embedded_${NAME}_size;\n\
const unsigned char kvant_embedded_${NAME}[] = {\n${bytes}};\n\
const std::size_t kvant_embedded_${NAME}_size = sizeof(kvant_embedded_${NAME});\n")
