// Logits of llama.cpp: llama-logits MODEL.gguf TOKENS THREADS
//
// Reads int32 ids, TOKENS at a time, from standard input. Writes float32 logits [TOKENS, vocabulary] of each
// such window to standard output. A window starts from an empty cache.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 4) return std::fputs("usage: llama-logits MODEL.gguf TOKENS THREADS\n", stderr), 2;
  const int tokens = std::atoi(argv[2]), threads = std::atoi(argv[3]);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return std::fprintf(stderr, "%s cannot be loaded\n", argv[1]), 1;
  llama_context_params wanted = llama_context_default_params();
  wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = tokens;
  wanted.n_threads = wanted.n_threads_batch = threads;
  llama_context* context = llama_init_from_model(model, wanted);
  if (!context) return std::fputs("no context of so many tokens\n", stderr), 1;
  const size_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_batch batch = llama_batch_init(tokens, 0, 1);
  std::vector<int32_t> ids(tokens);
  while (std::fread(ids.data(), sizeof(int32_t), tokens, stdin) == static_cast<size_t>(tokens)) {
    llama_memory_clear(llama_get_memory(context), true);
    batch.n_tokens = tokens;
    for (int i = 0; i < tokens; i++) {
      batch.token[i] = ids[i], batch.pos[i] = i, batch.logits[i] = 1;
      batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0;
    }
    if (llama_decode(context, batch)) return std::fputs("a window cannot be decoded\n", stderr), 1;
    for (int i = 0; i < tokens; i++)
      if (std::fwrite(llama_get_logits_ith(context, i), sizeof(float), vocabulary, stdout) != vocabulary) return 1;
    std::fflush(stdout);
  }
  return 0;
}
