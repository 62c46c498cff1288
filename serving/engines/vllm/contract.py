"""What this engine patches, calls and reads inside vLLM: one table, true of 0.26 and of 0.32.

`tests/serving/test_vllm_contract.py` looks each of them up in the sources of both ends of the
supported range. Nothing in this file imports vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hook:
    """A function or class of vLLM that this engine depends on.

    Attributes:
        file: where it is defined, below the package `vllm`.
        name: its qualified name there, `Request.__init__`; a function inside another follows it
            after a dot too.
        parameters: what comes first when it is called by position, in this order. `self` is not
            counted.
        named: what must be there under its name, wherever it stands: parameters of a function,
            fields and methods of a class, what its `__init__` sets on `self`, members of an enum.
        calls: functions it must find by their global names each time, so that replacing those in
            the module is enough.
        methods: methods it must call, of whatever object.
    """

    file: str
    name: str
    parameters: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


WORKER = "v1/worker/gpu_worker.py"
V1_RUNNER = "v1/worker/gpu_model_runner.py"
V2_RUNNER = "v1/worker/gpu/model_runner.py"
SCHEDULER = "v1/core/sched/scheduler.py"
SCHEDULED = "v1/core/sched/output.py"
REQUEST = "v1/request.py"
BLOCK_HASHES = "v1/core/kv_cache_utils.py"
PASS_OUTPUT = "v1/outputs.py"
ENGINE_OUTPUT = "v1/engine/__init__.py"
OUTPUT_PROCESSOR = "v1/engine/output_processor.py"
COMPILATION = "config/compilation.py"
KV_CACHE = "v1/core/kv_cache_manager.py"
ASYNC_LLM = "v1/engine/async_llm.py"
CHAT = "entrypoints/openai/chat_completion/protocol.py"
COMPLETION = "entrypoints/openai/completion/protocol.py"
ENDPOINT_PLUGIN = "plugins/endpoint_plugins/interface.py"
LINEAR = "model_executor/layers/linear.py"
PARAMETER = "model_executor/parameter.py"
QUANTIZATION = "model_executor/layers/quantization"
COMPRESSED_TENSORS = f"{QUANTIZATION}/compressed_tensors/compressed_tensors.py"

HOOKS: tuple[Hook, ...] = (
    # The worker: where layers are armed. The CPU's and XPU's workers inherit it.
    Hook(WORKER, "Worker.load_model", named=("load_dummy_weights",)),
    # The first runner: which token of a step belongs to which request.
    Hook(V1_RUNNER, "GPUModelRunner._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")),
    Hook(V1_RUNNER, "GPUModelRunner._dummy_run", ("num_tokens",)),
    Hook(V1_RUNNER, "GPUModelRunner.execute_model", ("scheduler_output", "intermediate_tensors")),
    Hook(V1_RUNNER, "GPUModelRunner.sample_tokens", ("grammar_output",)),
    Hook(
        V1_RUNNER,
        "GPUModelRunner",
        named=("use_async_scheduling", "input_batch", "device", "discard_request_mask"),
    ),
    Hook(
        "v1/worker/gpu_input_batch.py",
        "InputBatch",
        named=("req_ids", "num_reqs", "num_computed_tokens_cpu", "token_ids_cpu", "generators"),
    ),
    # The second runner. After the scheduler's output 0.26 takes one argument more, 0.32 three.
    Hook(V2_RUNNER, "GPUModelRunner.prepare_inputs", ("scheduler_output",)),
    Hook(
        V2_RUNNER,
        "GPUModelRunner.execute_model",
        ("scheduler_output", "intermediate_tensors", "dummy_run"),
    ),
    Hook(V2_RUNNER, "GPUModelRunner.sample_tokens", ("grammar_output",)),
    Hook(
        "v1/worker/gpu/input_batch.py",
        "InputBatch",
        named=("req_ids", "query_start_loc_np", "num_computed_tokens_np"),
    ),
    # What either runner returns.
    Hook(PASS_OUTPUT, "ModelRunnerOutput", named=("req_ids", "sampled_token_ids")),
    Hook(PASS_OUTPUT, "AsyncModelRunnerOutput.get_output"),
    # The scheduler: what it tells the workers, and how it is told that a request failed.
    Hook(
        SCHEDULED,
        "SchedulerOutput",
        named=(
            "scheduled_new_reqs",
            "finished_req_ids",
            "preempted_req_ids",
            "num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
        ),
    ),
    Hook(SCHEDULED, "NewRequestData", named=("req_id", "prompt_token_ids", "sampling_params")),
    Hook(SCHEDULER, "Scheduler.update_from_output", ("scheduler_output", "model_runner_output")),
    Hook(SCHEDULER, "Scheduler.finish_requests", ("request_ids", "finished_status")),
    Hook(SCHEDULER, "Scheduler", named=("requests", "kv_cache_manager", "connector")),
    Hook(KV_CACHE, "KVCacheManager.get_block_ids", ("request_id",)),
    Hook(KV_CACHE, "KVCacheManager.evict_blocks", ("block_ids",)),
    Hook(REQUEST, "RequestStatus", named=("FINISHED_ERROR",)),
    Hook(REQUEST, "Request", named=("request_id", "client_index", "get_finished_reason")),
    # The prefix cache: a steered request shares no block with others.
    Hook(REQUEST, "Request.__init__", named=("request_id", "sampling_params", "cache_salt")),
    Hook(
        BLOCK_HASHES,
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
    Hook(
        BLOCK_HASHES,
        "get_request_block_hasher.request_block_hasher",
        ("request",),
        calls=("generate_block_hash_extra_keys",),
    ),
    Hook(
        "v1/core/block_pool.py",
        "BlockPool.cache_full_blocks",
        calls=("generate_block_hash_extra_keys",),
    ),
    # The engine as its clients see it.
    Hook(ASYNC_LLM, "AsyncLLM.add_request", ("request_id", "prompt", "params")),
    Hook(ASYNC_LLM, "AsyncLLM.generate", ("prompt", "sampling_params", "request_id")),
    Hook(ASYNC_LLM, "AsyncLLM.abort", ("request_id",)),
    Hook(ASYNC_LLM, "AsyncLLM.reset_prefix_cache"),
    Hook(ASYNC_LLM, "AsyncLLM.collective_rpc", ("method", "timeout", "args", "kwargs")),
    Hook(ASYNC_LLM, "AsyncLLM", named=("vllm_config", "errored", "get_tokenizer", "shutdown")),
    Hook(
        ENGINE_OUTPUT,
        "EngineCoreOutput",
        named=(
            "request_id",
            "new_token_ids",
            "finish_reason",
            "stop_reason",
            "kv_transfer_params",
        ),
    ),
    Hook(ENGINE_OUTPUT, "EngineCoreOutputs", named=("outputs",)),
    Hook(OUTPUT_PROCESSOR, "OutputProcessor.process_outputs", ("engine_core_outputs",)),
    Hook(OUTPUT_PROCESSOR, "OutputProcessor", named=("request_states",)),
    Hook(OUTPUT_PROCESSOR, "RequestState", named=("external_req_id",)),
    Hook(
        "sampling_params.py",
        "SamplingParams",
        named=("extra_args", "skip_reading_prefix_cache", "detokenize"),
    ),
    # vLLM's own server: how a request gets in, how its answer is followed and ended.
    Hook(
        OUTPUT_PROCESSOR,
        "OutputProcessor.add_request",
        ("request", "prompt", "parent_req", "request_index", "queue"),
    ),
    Hook(OUTPUT_PROCESSOR, "OutputProcessor.abort_requests", ("request_ids", "internal")),
    Hook(OUTPUT_PROCESSOR, "OutputProcessorOutput", named=("reqs_to_abort",)),
    Hook(
        OUTPUT_PROCESSOR,
        "RequestState",
        named=("parent_req", "request_index", "prompt_token_ids", "detokenizer", "queue"),
    ),
    Hook(
        OUTPUT_PROCESSOR,
        "RequestState.make_request_output",
        ("new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params"),
    ),
    Hook(OUTPUT_PROCESSOR, "RequestOutputCollector.put", ("output",)),
    Hook("v1/engine/detokenizer.py", "IncrementalDetokenizer", named=("output_token_ids",)),
    Hook("v1/engine/parallel_sampling.py", "ParentRequest", named=("request_id",)),
    Hook(
        ENGINE_OUTPUT,
        "EngineCoreRequest",
        named=("request_id", "prompt_token_ids", "prompt_embeds", "sampling_params"),
    ),
    Hook("v1/engine/llm_engine.py", "LLMEngine.add_request", ("request_id", "prompt", "params")),
    Hook("config/model.py", "ModelConfig", named=("model", "served_model_name", "max_model_len")),
    Hook("exceptions.py", "VLLMValidationError.__init__", ("message",), named=("parameter",)),
    # Where its routes read their bodies, and where the receipt goes.
    Hook(CHAT, "ChatCompletionRequest", named=("vllm_xargs",)),
    Hook(CHAT, "ChatCompletionRequest.to_sampling_params"),
    Hook(CHAT, "ChatCompletionRequest.to_beam_search_params"),
    Hook(CHAT, "ChatCompletionResponse", named=("kv_transfer_params",)),
    Hook(COMPLETION, "CompletionRequest", named=("vllm_xargs",)),
    Hook(COMPLETION, "CompletionRequest.to_sampling_params"),
    Hook(COMPLETION, "CompletionRequest.to_beam_search_params"),
    Hook(COMPLETION, "CompletionResponse", named=("kv_transfer_params",)),
    Hook("entrypoints/openai/responses/protocol.py", "ResponsesRequest", named=("vllm_xargs",)),
    Hook("entrypoints/openai/responses/protocol.py", "ResponsesRequest.to_sampling_params"),
    Hook("entrypoints/anthropic/protocol.py", "AnthropicMessagesRequest"),
    Hook(ENDPOINT_PLUGIN, "EndpointPlugin", named=("name", "required_tasks")),
    Hook(ENDPOINT_PLUGIN, "EndpointPlugin.attach_router", ("app",)),
    Hook(ENDPOINT_PLUGIN, "EndpointPlugin.init_state", ("engine_client", "state", "args")),
    # The configuration, and the way in for our own op.
    Hook("config/vllm.py", "VllmConfig", named=("additional_config",)),
    Hook("config/vllm.py", "VllmConfig.__post_init__"),
    Hook(
        COMPILATION,
        "CompilationConfig",
        named=("splitting_ops", "cudagraph_mode", "static_forward_context"),
    ),
    Hook(
        COMPILATION,
        "CUDAGraphMode",
        named=("PIECEWISE", "has_full_cudagraphs", "requires_piecewise_compilation"),
    ),
    # Options that are refused: under another name they would be let through. The one for adaptive
    # verification is younger than 0.26.
    Hook(
        "config/parallel.py",
        "ParallelConfig",
        named=("enable_dbo", "prefill_context_parallel_size"),
    ),
    Hook("config/cache.py", "CacheConfig", named=("kv_sharing_fast_prefill",)),
    Hook("config/scheduler.py", "SchedulerConfig", named=("runner_type",)),
    Hook(
        "utils/torch_utils.py",
        "direct_register_custom_op",
        ("op_name", "op_func", "mutates_args", "fake_impl"),
    ),
    # Quantised folders: how our method is found, and which layers it is asked about.
    Hook(f"{QUANTIZATION}/__init__.py", "register_quantization_config", ("quantization",)),
    Hook(
        "config/model.py",
        "ModelConfig._verify_quantization",
        methods=("override_quantization_method",),
    ),
    Hook(
        f"{QUANTIZATION}/base_config.py",
        "QuantizationConfig.override_quantization_method",
        named=("hf_quant_cfg", "user_quant", "hf_config"),
    ),
    Hook(
        f"{QUANTIZATION}/base_config.py",
        "QuantizationConfig.maybe_update_config",
        ("model_name", "hf_config"),
    ),
    Hook(
        "config/vllm.py",
        "VllmConfig._get_quantization_config",
        methods=("maybe_update_config",),
    ),
    Hook(
        COMPRESSED_TENSORS,
        "CompressedTensorsConfig.get_quant_method",
        ("layer", "prefix"),
        methods=("get_scheme",),
    ),
    Hook(COMPRESSED_TENSORS, "CompressedTensorsConfig.get_scheme", ("layer", "layer_name")),
    Hook(COMPRESSED_TENSORS, "CompressedTensorsConfig.get_scheme_dict", ("layer", "layer_name")),
    Hook(COMPRESSED_TENSORS, "CompressedTensorsConfig.apply_vllm_mapper", ("hf_to_vllm_mapper",)),
    Hook(COMPRESSED_TENSORS, "CompressedTensorsConfig._check_scheme_supported"),
    Hook(COMPRESSED_TENSORS, "CompressedTensorsConfig", named=("quant_format",)),
    Hook(COMPRESSED_TENSORS, "CompressedTensorsConfig.from_config", named=("config",)),
    Hook(f"{QUANTIZATION}/base_config.py", "QuantizationConfig", named=("packed_modules_mapping",)),
    Hook("config/vllm.py", "VllmConfig", named=("quant_config",)),
    Hook(
        COMPRESSED_TENSORS,
        "CompressedTensorsLinearMethod.create_weights",
        methods=("create_weights",),
    ),
    Hook(
        COMPRESSED_TENSORS,
        "CompressedTensorsLinearMethod.process_weights_after_loading",
        methods=("process_weights_after_loading",),
    ),
    Hook(
        COMPRESSED_TENSORS,
        "CompressedTensorsLinearMethod.apply",
        methods=("apply_weights",),
    ),
    Hook("model_executor/models/utils.py", "WeightsMapper.apply_list", ("values",)),
    # What a layer's parameters do with what is read: cut it for this rank, put it into its rows.
    *(
        Hook(LINEAR, f"{kind}.weight_loader_v2", ("param", "loaded_weight"), methods=(loads,))
        for kind, loads in (
            ("ColumnParallelLinear", "load_column_parallel_weight"),
            ("MergedColumnParallelLinear", "load_merged_column_weight"),
            ("QKVParallelLinear", "load_qkv_weight"),
            ("RowParallelLinear", "load_row_parallel_weight"),
        )
    ),
    Hook(LINEAR, "LinearBase", named=("tp_rank",)),
    *(
        Hook(PARAMETER, f"{kind}.__init__", named=named)
        for kind, named in (
            ("BasevLLMParameter", ("data", "weight_loader")),
            ("_ColumnvLLMParameter", ("output_dim",)),
            ("RowvLLMParameter", ("input_dim",)),
            ("PackedvLLMParameter", ("packed_factor", "packed_dim")),
        )
    ),
    Hook(PARAMETER, "BasevLLMParameter", named=("tp_rank", "tp_size")),
    Hook(PARAMETER, "ModelWeightParameter"),
    Hook(PARAMETER, "GroupQuantScaleParameter"),
    Hook(PARAMETER, "ChannelQuantScaleParameter"),
    Hook(PARAMETER, "PerTensorScaleParameter"),
    Hook("config/load.py", "LoadConfig", named=("load_format",)),
    Hook("config/vllm.py", "get_current_vllm_config_or_none"),
)
