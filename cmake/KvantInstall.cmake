# Install tree: static libraries, public headers (the HEADERS of each kvant_library) and a package
# `find_package(kvant [COMPONENTS folder...])` with the targets kvant::<folder> and kvant::kvant (all).
include_guard()
include(CMakePackageConfigHelpers)

get_property(libraries GLOBAL PROPERTY KVANT_LIBRARIES)
add_library(kvant_all INTERFACE)
add_library(kvant::kvant ALIAS kvant_all)
set_target_properties(kvant_all PROPERTIES EXPORT_NAME kvant)
target_link_libraries(kvant_all INTERFACE ${libraries})

install(TARGETS ${libraries} EXPORT kvantTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS kvant_all EXPORT kvantTargets)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kvant)
install(EXPORT kvantTargets NAMESPACE kvant:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/kvantConfig.cmake.in
                              ${PROJECT_BINARY_DIR}/kvantConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvantConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kvantConfig.cmake ${PROJECT_BINARY_DIR}/kvantConfigVersion.cmake
        DESTINATION ${package_dir})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/kvant)

# The service and an example of its configuration; nothing is enabled.
configure_file(${PROJECT_SOURCE_DIR}/packaging/kvant.service.in ${PROJECT_BINARY_DIR}/kvant.service @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/kvant.service DESTINATION lib/systemd/system)
install(FILES ${PROJECT_SOURCE_DIR}/packaging/serve.yaml ${PROJECT_SOURCE_DIR}/docs/grafana/kvant.json
              ${PROJECT_SOURCE_DIR}/docs/grafana/alerts.yml
        DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/kvant/examples)
