"""OpenVINO GenAI with cache eviction, one row, the weights as the file holds them. Run in its own environment."""

import json
import os
import sys

import openvino_genai as genai

request = json.loads(sys.argv[1])
path = request["folder"] if request["gguf"] is None else os.path.join(request["folder"], request["gguf"])
start, recent = 32, 64
kept = max(request["kept"] // 32 * 32, start + recent + 32)
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 1
scheduler.enable_prefix_caching = False
scheduler.use_cache_eviction = True
scheduler.cache_eviction_config = genai.CacheEvictionConfig(start, recent, kept, genai.AggregationMode.NORM_SUM)
pipeline = genai.LLMPipeline(path, "CPU", scheduler_config=scheduler)
tokenizer = pipeline.get_tokenizer()
text = "The quick brown fox jumps over the lazy dog. " * request["context"]
prompt = tokenizer.decode(tokenizer.encode(text).input_ids.data[0, : request["context"]].tolist())
config = genai.GenerationConfig()
config.max_new_tokens = config.min_new_tokens = request["new_tokens"] + 3
config.ignore_eos = True
metrics = pipeline.generate([prompt], config).perf_metrics
steps = [microseconds / 1e6 for microseconds in metrics.raw_metrics.token_infer_durations]
figures = {"rows": 1, "prefill_s": metrics.get_ttft().mean / 1e3, "steps_s": steps[-request["new_tokens"] :]}
print(json.dumps(figures))
