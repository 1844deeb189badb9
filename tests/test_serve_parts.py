"""The private parts of transformers that vtc/serve/engine.py and the replies stand on: where one moves, this fails."""

import inspect

import pytest
from serve_fixtures import engine, soon
from transformers.cli.serving import chat_completion, server, utils
from transformers.generation.continuous_batching import cache, continuous_api, input_outputs, requests, scheduler
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.utils import drain_queue

Manager, Processor = continuous_api.ContinuousBatchingManager, continuous_api.ContinuousBatchProcessor
Inputs, Handler = input_outputs.ContinuousBatchingIOs, chat_completion.ChatCompletionHandler
SIGNATURES = {
    Manager.__init__: "self model generation_config continuous_batching_config workload_hints",
    Manager._create_batch_processor: "self",
    Manager._generation_loop_body: "self batch_processor bootstrapping",
    Manager.add_request: "self input_ids request_id max_new_tokens streaming record_timestamps eos_token_id "
    "logit_processor_kwargs",
    Manager.register_result_handler: "self request_id callback",
    Manager.cancel_request: "self request_id",
    Manager.stop: "self block timeout keep_for_next_session hard_stop",
    continuous_api.BackgroundThreadStatus.can_accept_new_requests: "self",
    Inputs.prepare_batch_tensors: "self requests_in_batch logits_processors use_decode_fast_path num_q_tokens "
    "max_kv_read use_padding",
    cache_allocator.compute_block_hash: "parent_hash tokens",
    drain_queue: "q",
    utils.CBGenerateManager.generate_streaming: "self model processor inputs gen_config request_id response_parser",
    utils.CBGenerateManager.generate_non_streaming: "self model processor inputs gen_config request_id",
    utils.BaseHandler.get_processor_inputs_from_messages: "messages modality",
    Handler.handle_request: "self body request_id",
    Handler._streaming: "self request_id model processor model_id inputs gen_config gen_manager tools",
    Handler._non_streaming: "self request_id model processor model_id inputs gen_config gen_manager tools",
    Handler._build_completion: "self request_id content model_id finish_reason usage tool_calls reasoning_content",
    Handler._build_chunk_sse: "self request_id content model role finish_reason tool_calls usage reasoning_content",
    server.build_server: "model_manager chat_handler completion_handler response_handler transcription_handler "
    "systemone_handler generation_state enable_cors",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert " ".join(inspect.signature(function).parameters) == SIGNATURES[function]


def test_what_running_parts_hold():
    with engine() as (runs, _):
        assert soon(lambda: runs.batch_processor is not None)
        inputs, plan = runs.batch_processor.inputs_and_outputs, runs.batch_processor.scheduler
        assert isinstance(inputs, Inputs)
        assert isinstance(plan, scheduler.Scheduler)
        assert {*vars(inputs)} >= {"input_ids", "position_ids", "requests_in_batch", "prepare_batch_tensors"}
        assert isinstance(plan.active_requests, dict)
        assert isinstance(plan.waiting_requests, dict)
        assert plan.block_new_requests is False
        assert isinstance(runs.output_router.result_handlers, dict)
        assert runs.output_router._lock
        assert runs.background_thread_status.fatal_error is None
        assert isinstance(runs.batch_processor.cache, cache.PagedAttentionCache)
        for allocator in runs.batch_processor.cache.cache_allocators.values():
            assert isinstance(allocator.block_table, dict)


def test_what_requests_hold():
    state = requests.RequestState("a", [1, 2])
    assert (state.request_id, state.position_offset) == ("a", 0)
    assert {"state", "query_length"} <= {*requests.FutureRequestState.__slots__}
    assert requests.RequestState("a", [1], record_timestamps=True).to_generation_output().timestamps == []


def test_a_block_is_found_by_all_that_comes_before_it():
    """Of an image's visual tokens only the first has an id that is its own."""
    hashed = cache_allocator.compute_block_hash
    assert hashed(hashed(None, [1, 2]), [3, 4]) != hashed(hashed(None, [1, 5]), [3, 4])


def test_the_state_that_health_asks():
    assert utils.GenerationState()._cb_manager is None
    assert utils.CBGenerateManager()._cb is None
