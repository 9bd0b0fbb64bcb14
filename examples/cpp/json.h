// The little of JSON that manifests and safetensors headers need.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum class Kind { null, boolean, number, text, list, object } kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json& operator[](const std::string& name) const {
    auto found = object.find(name);
    if (found == object.end()) throw std::runtime_error("there is no field " + name);
    return found->second;
  }
  int64_t integer() const { return static_cast<int64_t>(number); }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& source) : source_(source) {}

  Json read() {
    Json value = read_value(0);
    if (peek() != '\0') fail();
    return value;
  }

 private:
  Json read_value(int depth) {
    if (depth > 64) fail();
    Json value;
    switch (peek()) {
      case '{':
        value.kind = Json::Kind::object;
        for (bool more = begin('}'); more; more = next('}')) {
          std::string name = read_text();
          expect(':');
          value.object[name] = read_value(depth + 1);
        }
        return value;
      case '[':
        value.kind = Json::Kind::list;
        for (bool more = begin(']'); more; more = next(']')) value.list.push_back(read_value(depth + 1));
        return value;
      case '"':
        value.kind = Json::Kind::text;
        value.text = read_text();
        return value;
      case 't':
      case 'f':
        value.kind = Json::Kind::boolean;
        value.boolean = peek() == 't';
        word(value.boolean ? "true" : "false");
        return value;
      case 'n':
        word("null");
        return value;
      default: {
        value.kind = Json::Kind::number;
        const char* start = source_.c_str() + at_;
        char* end = nullptr;
        value.number = std::strtod(start, &end);
        if (end == start) fail();
        at_ += end - start;
        return value;
      }
    }
  }

  std::string read_text() {
    expect('"');
    std::string text;
    while (at_ < source_.size() && source_[at_] != '"') {
      char letter = source_[at_++];
      if (letter == '\\' && at_ < source_.size()) {
        letter = source_[at_++];
        if (letter == 'u') fail();  // names here are plain
        if (letter == 'n') letter = '\n';
        if (letter == 't') letter = '\t';
      }
      text += letter;
    }
    expect('"');
    return text;
  }

  char peek() {
    while (at_ < source_.size() && std::string(" \t\r\n").find(source_[at_]) != std::string::npos) ++at_;
    return at_ < source_.size() ? source_[at_] : '\0';
  }
  void expect(char letter) {
    if (peek() != letter) fail();
    ++at_;
  }
  bool begin(char end) {
    ++at_;
    if (peek() != end) return true;
    ++at_;
    return false;
  }
  bool next(char end) {
    if (peek() == ',') {
      ++at_;
      return true;
    }
    expect(end);
    return false;
  }
  void word(const std::string& expected) {
    if (source_.compare(at_, expected.size(), expected) != 0) fail();
    at_ += expected.size();
  }
  [[noreturn]] void fail() const { throw std::runtime_error("not JSON at byte " + std::to_string(at_)); }

  const std::string& source_;
  size_t at_ = 0;
};
