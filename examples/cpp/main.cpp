// Runs an engine with libtorch alone: run_engine ENGINE 1,15,27,9 16 prints the 16 token ids that are generated,
// greedily, behind the prompt's. An engine is executable code: run none that you would not run as a program.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "json.h"

namespace fs = std::filesystem;
using torch::Tensor;

static std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

static torch::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, torch::ScalarType> known = {
      {"F64", torch::kFloat64},       {"float64", torch::kFloat64}, {"F32", torch::kFloat32},
      {"float32", torch::kFloat32},   {"F16", torch::kFloat16},     {"float16", torch::kFloat16},
      {"BF16", torch::kBFloat16},     {"bfloat16", torch::kBFloat16}, {"I64", torch::kInt64},
      {"int64", torch::kInt64},       {"I32", torch::kInt32},       {"int32", torch::kInt32},
      {"BOOL", torch::kBool},         {"bool", torch::kBool}};
  return known.at(name);
}

static std::vector<int64_t> sizes_of(const Json& shape) {
  std::vector<int64_t> sizes;
  for (const Json& size : shape.list) sizes.push_back(size.integer());
  return sizes;
}

// The weights are views of one mapped file: eight bytes of header size, the header, then the tensors.
static std::map<std::string, Tensor> load_weights(const fs::path& path, torch::Device device) {
  auto bytes = torch::from_file(path.string(), /*shared=*/false, static_cast<int64_t>(fs::file_size(path)), torch::kUInt8);
  const auto* start = bytes.data_ptr<uint8_t>();
  uint64_t header_size = 0;
  for (int place = 7; place >= 0; --place) header_size = header_size << 8 | start[place];
  if (header_size + 8 > fs::file_size(path)) throw std::runtime_error(path.string() + " is no safetensors file");
  const std::string text(reinterpret_cast<const char*>(start + 8), header_size);
  const Json header = JsonReader(text).read();
  std::map<std::string, Tensor> weights;
  for (const auto& [name, entry] : header.object) {
    if (name == "__metadata__") continue;
    int64_t from = 8 + header_size + entry["data_offsets"].list[0].integer();
    int64_t to = 8 + header_size + entry["data_offsets"].list[1].integer();
    auto view = torch::from_blob(bytes.slice(0, from, to).data_ptr(), sizes_of(entry["shape"]),
                                 [bytes](void*) {}, torch::dtype(dtype_of(entry["dtype"].text)));
    weights[name] = view.to(device);
  }
  return weights;
}

struct Graph {
  torch::inductor::AOTIModelPackageLoader loader;
  std::vector<Tensor> weights;

  Tensor operator()(std::vector<Tensor> tokens, const std::vector<Tensor>& state) {
    std::vector<Tensor> inputs = weights;
    inputs.insert(inputs.end(), tokens.begin(), tokens.end());
    inputs.insert(inputs.end(), state.begin(), state.end());
    return loader.run(inputs)[0];
  }
};

static Graph load_graph(const fs::path& folder, const Json& package, const std::map<std::string, Tensor>& weights) {
  std::vector<Tensor> taken;
  for (const Json& name : package["weights"].list) taken.push_back(weights.at(name.text));
  return Graph{torch::inductor::AOTIModelPackageLoader((folder / package["file"].text).string()), std::move(taken)};
}

static void generate(const fs::path& folder, const std::vector<int64_t>& prompt, size_t count) {
  const std::string text = read_file(folder / "manifest.json");
  const Json manifest = JsonReader(text).read();
  const torch::Device device(manifest["machine"]["device"].text);
  const auto weights = load_weights(folder / "weights.safetensors", device);
  Graph prefill = load_graph(folder, manifest["packages"]["prefill"], weights);
  Graph decode = load_graph(folder, manifest["packages"]["decode"], weights);

  std::vector<Tensor> state;  // a session: buffers that the graphs read and change
  const auto& inputs = manifest["packages"]["decode"]["inputs"].list;
  for (size_t index = 2; index < inputs.size(); ++index) {
    auto options = torch::dtype(dtype_of(inputs[index]["dtype"].text)).device(device);
    Tensor buffer = torch::zeros(sizes_of(inputs[index]["shape"]), options);
    if (inputs[index]["name"].text.rfind("positions_", 0) == 0) buffer += torch::arange(buffer.size(2), options);
    state.push_back(buffer);
  }

  const int64_t rows = manifest["batch_size"].integer();
  const int64_t columns = std::max<int64_t>(prompt.size(), manifest["shortest"].integer());
  Tensor ids = torch::zeros({rows, columns}, torch::kInt64);
  for (size_t place = 0; place < prompt.size(); ++place) ids.select(1, place).fill_(prompt[place]);
  Tensor positions = torch::arange(columns).expand({rows, columns}).contiguous();
  Tensor valid = positions < static_cast<int64_t>(prompt.size());
  Tensor logits = prefill({ids.to(device), positions.to(device), valid.to(device)}, state);
  for (size_t done = 1;; ++done) {
    Tensor token = logits.select(1, -1).argmax(-1, /*keepdim=*/true);
    const int64_t first = token[0][0].item<int64_t>();
    std::cout << (done > 1 ? "," : "") << first;
    bool over = done >= count;
    for (const Json& end : manifest["end_tokens"].list) over = over || end.integer() == first;
    if (over) break;
    logits = decode({token, torch::full_like(token, static_cast<int64_t>(prompt.size() + done - 1))}, state);
  }
  std::cout << std::endl;
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "run_engine ENGINE TOKENS COUNT, tokens separated by commas" << std::endl;
    return 2;
  }
  try {
    torch::NoGradGuard no_grad;
    std::vector<int64_t> prompt;
    std::istringstream tokens(argv[2]);
    for (std::string token; std::getline(tokens, token, ',');) prompt.push_back(std::stoll(token));
    generate(argv[1], prompt, std::stoul(argv[3]));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
}
