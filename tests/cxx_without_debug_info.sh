#!/bin/sh
# The C++ compiler without -g, with which DeepSpeed's ops would take nearly twice as long to compile.
for argument; do
  shift
  [ "$argument" = -g ] || set -- "$@" "$argument"
done
exec c++ "$@"
