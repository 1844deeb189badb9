"""Two replicas behind Ray Serve, where Ray is installed."""

import httpx
import pytest
from serve_fixtures import QUARTER, QUESTIONS, free_port, picture, request, spoken, tiny

from vtc.serve.replicas import application

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")


def test_two_replicas_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import ray
    from ray import serve

    for part in tiny():
        part.save_pretrained(tmp_path)
    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"model": str(tmp_path), "name": "tiny", "replicas": "2"}))
        for number in range(6):
            asked = request(QUESTIONS[number % 3], picture(number))
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=60).json()
            expected = spoken(QUESTIONS[number % 3], QUARTER, picture(number))
            assert reply["choices"][0]["message"]["content"] == expected
        (found,) = serve.status().applications["default"].deployments.values()
        assert found.replica_states == {"RUNNING": 2}
    finally:
        serve.shutdown()
        ray.shutdown()


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="unknown budgets; there are model"):
        application({"budgets": "0.25"})
