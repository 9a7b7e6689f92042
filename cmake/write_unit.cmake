# Writes what TOOL prints for FAMILY to UNIT, unless it says so already.
execute_process(COMMAND ${TOOL} ${FAMILY} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
set(old "")
if(EXISTS ${UNIT})
  file(READ ${UNIT} old)
endif()
if(NOT old STREQUAL text)
  file(WRITE ${UNIT} "${text}")
endif()
