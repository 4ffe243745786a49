// Around the body of each function that Python calls: null, or what went wrong.
#pragma once
#include <exception>
#include <string>

template <class Body>
const char* guarded(Body body) {
  static std::string error;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
