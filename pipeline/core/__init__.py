"""The ground floor: errors, typed configuration, command lines, atomic files, artefacts, the machine."""
