"""enable, disable, patched, status: what is bound where, before, during and after. Stub engines, no GPU."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from dispatch_fixtures import FA3, SGL, VLLM, Recorder, clean_modules, engine, hopper, kvcache_call, stub, upstream

from etap_integration import dispatch
from etap_integration.dispatch import FallbackError, TargetError, disable, enable, patched, reset_counts, status

F = "flash_attn_with_kvcache"


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ETAP_STRICT", raising=False)
    reset_counts()
    with clean_modules():
        yield
        disable()
    assert not status().enabled


@pytest.fixture
def fa3() -> ModuleType:
    return engine(FA3)


@pytest.fixture
def options() -> dict[str, Any]:
    """A recording operator on a make-believe Hopper GPU."""
    return {"operator": Recorder(), "machine": hopper}


def test_replaced_and_restored(fa3: ModuleType, options: dict[str, Any]) -> None:
    before = dict(vars(fa3))
    found = enable(FA3, **options)
    assert found.targets[FA3].patched and found.enabled
    assert set(found.targets[FA3].bindings) == {f"{FA3}.{F}", f"{FA3}.flash_attn_varlen_func"}
    assert getattr(fa3, F) is not before[F] and getattr(fa3, F).__wrapped__ is before[F]
    assert fa3.get_scheduler_metadata is before["get_scheduler_metadata"]  # a sibling
    assert getattr(fa3, F)(**kvcache_call()) == "out"
    assert disable() == ()
    assert vars(fa3) == before
    assert not status().enabled


def test_the_second_enable_changes_nothing(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    enable(FA3, **options)
    once = getattr(fa3, F)
    enable(FA3, **options)
    enable(**options)
    assert getattr(fa3, F) is once
    getattr(fa3, F)(**kvcache_call())
    assert len(options["operator"].calls) == 1 and status().etap_calls == 1
    disable()
    assert getattr(fa3, F) is original
    disable()
    assert getattr(fa3, F) is original


def test_enabling_again_with_other_options_is_refused(fa3: ModuleType, options: dict[str, Any]) -> None:
    enable(FA3, **options)
    with pytest.raises(ValueError, match=r"enabled already.*max_rows=64.*disable\(\) first"):
        enable(FA3, **options, max_rows=16)
    more_than_16 = kvcache_call(heads=24, batch=5)  # of fewer requests they would be upstream's by a measured rule
    assert getattr(fa3, F)(**more_than_16) == "out"  # the refused limit does not hold
    disable()
    enable(FA3, **options, max_rows=16)
    assert getattr(fa3, F)(**more_than_16) == "upstream" and status().fallbacks == {"too many query rows": 1}


def test_nothing_installed(options: dict[str, Any]) -> None:
    found = enable(**options)
    assert not found.enabled
    assert all("not installed; it comes with" in target.note for target in found.targets.values())


def test_only_what_is_installed(options: dict[str, Any]) -> None:
    sgl = engine(SGL)
    found = enable(**options)
    assert [name for name, target in found.targets.items() if target.patched] == [SGL]
    assert getattr(sgl, F)(**kvcache_call()) == "out"


def test_targets_apart(options: dict[str, Any]) -> None:
    fa3, vllm = engine(FA3), engine(VLLM)
    untouched = getattr(fa3, F)
    enable(VLLM, **options)
    assert getattr(fa3, F) is untouched
    enable(**options)
    assert getattr(fa3, F) is not untouched
    disable(FA3)
    assert getattr(fa3, F) is untouched and status().targets[VLLM].patched
    disable(VLLM)
    assert not hasattr(vllm.flash_attn_varlen_func, "__wrapped__")


def test_a_target_asked_for_must_be_there(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    with pytest.raises(TargetError, match=r"sgl_kernel\.flash_attn is not installed; it comes with sgl-kernel"):
        enable(FA3, SGL, **options)
    assert getattr(fa3, F) is original and not status().enabled
    with pytest.raises(ValueError, match=r"'vllm' is no target; they are flash_attn_interface, .*vllm_flash_attn"):
        enable("vllm")
    with pytest.raises(ValueError, match="no target"):
        disable("vllm")
    with pytest.raises(ValueError, match="max_rows"):
        enable(FA3, max_rows=0)


def test_a_renamed_symbol(options: dict[str, Any]) -> None:
    stub(FA3, flash_attn_with_cache=upstream(FA3, F))
    with pytest.raises(TargetError, match=f"{FA3} has no function {F} \\(it has flash_attn_with_cache\\)"):
        enable(FA3, **options)
    assert "has no function" in enable(**options).targets[FA3].note  # not asked for: passed over


def test_a_renamed_parameter(options: dict[str, Any]) -> None:
    def flash_attn_with_kvcache(q, k_cache, v_cache, q_v=None, cache_seqlens=None):
        return "upstream"

    stub(FA3, flash_attn_with_kvcache=flash_attn_with_kvcache)
    with pytest.raises(TargetError, match="not the function etap_integration knows: it has no parameter 'qv'"):
        enable(FA3, **options)
    assert "no parameter 'qv'" in enable(**options).targets[FA3].note
    assert getattr(sys.modules[FA3], F) is flash_attn_with_kvcache


def test_a_broken_installation(options: dict[str, Any], tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{FA3}.py").write_text("raise OSError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="cannot be imported: OSError: undefined symbol"):
        enable(FA3, **options)
    assert "undefined symbol" in enable(**options).targets[FA3].note
    (tmp_path / f"{FA3}.py").write_text("import no_such_dependency\n")
    importlib.invalidate_caches()
    with pytest.raises(TargetError, match="cannot be imported: No module named 'no_such_dependency'"):
        enable(FA3, **options)


def test_a_function_that_this_release_lacks(options: dict[str, Any]) -> None:
    stub(FA3, **{F: upstream(FA3, F)})
    assert enable(FA3, **options).targets[FA3].note == "flash_attn_varlen_func: not there"


def test_bindings_imported_earlier_are_reached(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    consumer = stub("engine.backend", attend=original, other=len)
    sys.modules["alias_of_the_same_module"] = consumer
    enable(FA3, **options)
    assert consumer.attend is getattr(fa3, F) and consumer.other is len
    assert "engine.backend.attend" in status().targets[FA3].bindings
    assert consumer.attend(**kvcache_call()) == "out"
    disable()
    assert consumer.attend is original


def test_bindings_imported_later_are_reached_and_restored(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    enable(FA3, **options)
    consumer = stub("engine.backend", attend=getattr(fa3, F))
    assert consumer.attend(**kvcache_call()) == "out"
    disable()
    assert consumer.attend is original


def test_the_second_enable_reaches_what_came_up_since(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    enable(FA3, **options)
    consumer = stub("engine.backend", attend=original)
    enable(FA3, **options)
    assert consumer.attend is getattr(fa3, F)


def test_a_wrapper_kept_elsewhere_goes_to_upstream_after_disable(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    enable(FA3, **options)
    kept = functools.partial(getattr(fa3, F), causal=True)
    disable()
    assert kept(**kvcache_call()) == "upstream"
    assert len(original.calls) == 1 and original.calls[0]["causal"] is True
    assert options["operator"].calls == []
    enable(FA3, **options)
    assert kept(**kvcache_call()) == "upstream"  # it belongs to the first time


def test_somebody_elses_binding_is_left_alone(
    fa3: ModuleType, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    original = getattr(fa3, F)
    consumer = stub("engine.backend", attend=original)
    enable(FA3, **options)
    ours = getattr(fa3, F)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ("theirs", ours(*args, **kwargs))

    consumer.attend = theirs
    replaced = status().targets[FA3].replaced
    assert len(replaced) == 1 and replaced[0].startswith("engine.backend.attend is now ") and "theirs" in replaced[0]
    assert f"replaced by somebody else: {replaced[0]}" in str(status())
    with caplog.at_level(logging.WARNING, logger="etap_integration.dispatch"):
        assert disable() == replaced
    assert replaced[0] in caplog.text
    assert consumer.attend is theirs and getattr(fa3, F) is original
    assert status().left_alone == replaced
    assert consumer.attend(**kvcache_call()) == ("theirs", "upstream")


def test_a_deleted_binding(fa3: ModuleType, options: dict[str, Any]) -> None:
    enable(FA3, **options)
    delattr(fa3, F)
    assert disable() == (f"{FA3}.{F} is gone",)
    assert not hasattr(fa3, F)


def test_our_stand_in_put_back_by_somebody_else(fa3: ModuleType, options: dict[str, Any]) -> None:
    """Another tool saves our wrapper, and puts it back after we are gone: enabled again, it is not wrapped twice."""
    original = getattr(fa3, F)
    enable(FA3, **options)
    stale = getattr(fa3, F)
    disable()
    setattr(fa3, F, stale)
    enable(FA3, **options)
    assert getattr(fa3, F).__wrapped__ is original
    getattr(fa3, F)(**kvcache_call(softcap=1.0))
    assert len(original.calls) == 1 and sum(status().fallbacks.values()) == 1
    disable()
    assert getattr(fa3, F) is original


def test_one_function_under_two_targets(options: dict[str, Any]) -> None:
    fa3, sgl = engine(FA3), engine(SGL)
    original = getattr(fa3, F)
    setattr(sgl, F, original)
    enable(FA3, **options)
    assert enable(SGL, **options).targets[SGL].note == f"{F}: routed as {FA3}.{F} already"
    getattr(sgl, F)(**kvcache_call())
    assert len(options["operator"].calls) == 1
    disable()
    assert getattr(sgl, F) is getattr(fa3, F) is original


def test_patched_blocks_nest(fa3: ModuleType, options: dict[str, Any]) -> None:
    original, narrow = getattr(fa3, F), Recorder()
    with patched(FA3, **options):
        wrapper = getattr(fa3, F)
        with patched(FA3, operator=narrow, machine=hopper, max_rows=8):
            assert getattr(fa3, F) is wrapper
            assert wrapper(**kvcache_call(heads=16)) == "upstream"  # the inner block's limit
            assert wrapper(**kvcache_call(heads=8)) == "out" and len(narrow.calls) == 1
        assert getattr(fa3, F) is wrapper
        assert wrapper(**kvcache_call(heads=16)) == "out"
    assert getattr(fa3, F) is original and len(options["operator"].calls) == 1


def test_patched_inside_enable_and_the_other_way_round(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    enable(FA3, **options)
    with patched(FA3, **options):
        pass
    assert getattr(fa3, F) is not original
    with patched(FA3, **options):
        disable()
        assert getattr(fa3, F)(**kvcache_call()) == "out"  # the block still holds it
    assert getattr(fa3, F) is original
    for _ in range(2):
        enabled = status().enabled
        with patched(FA3, **options, max_rows=8):
            enable(FA3, **options)  # whoever asked last decides, and enable() again is not asking
            assert getattr(fa3, F)(**kvcache_call(heads=16)) == ("upstream" if enabled else "out")
        assert getattr(fa3, F)(**kvcache_call(heads=16)) == "out"


def test_blocks_may_overlap(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    first, second = patched(FA3, **options), patched(FA3, **options)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert getattr(fa3, F)(**kvcache_call()) == "out"
    second.__exit__(None, None, None)
    assert getattr(fa3, F) is original


def test_a_block_left_by_an_exception(fa3: ModuleType, options: dict[str, Any]) -> None:
    original = getattr(fa3, F)
    with pytest.raises(KeyError), patched(FA3, **options):
        raise KeyError
    assert getattr(fa3, F) is original


def test_threads(fa3: ModuleType, options: dict[str, Any]) -> None:
    """Eight threads patch and call at random; every call is answered, counts add up, the original comes back."""
    original, arguments = getattr(fa3, F), kvcache_call()
    failures: list[BaseException] = []
    answers: list[str] = []
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(30):
                if index % 2:
                    with patched(FA3, **options):
                        answers.append(getattr(fa3, F)(**arguments))
                else:
                    enable(FA3, **options)
                    answers.append(getattr(fa3, F)(**arguments))
                    disable(FA3)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(answers) == 240
    assert answers.count("out") == status().etap_calls == len(options["operator"].calls)
    assert answers.count("upstream") == len(original.calls)
    assert not status().enabled and getattr(fa3, F) is original


def test_signatures_are_upstreams(options: dict[str, Any]) -> None:
    modules = [engine(name) for name in (FA3, SGL, VLLM)]
    before = {(m.__name__, n): inspect.signature(f) for m in modules for n, f in vars(m).items() if callable(f)}
    enable(**options)
    for (module, name), signature in before.items():
        function = getattr(sys.modules[module], name)
        assert inspect.signature(function) == signature
        assert name == "get_scheduler_metadata" or (function.__name__, function.__doc__) == (name, "Upstream.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_size": (5, 0)}, "window_size"),
        ({"softcap": 1.0}, "softcap"),
        ({"heads": 128}, "too many query rows"),
        ({"qv": None}, "qv is not given: no MLA call"),
    ],
)
def test_fall_backs_reach_upstream_unchanged_and_are_counted(
    fa3: ModuleType, options: dict[str, Any], changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    original, arguments = getattr(fa3, F), kvcache_call(**changes)
    enable(FA3, **options)
    with caplog.at_level(logging.INFO, logger="etap_integration.dispatch"):
        for _ in range(3):
            assert getattr(fa3, F)(**arguments) == "upstream"
    assert len(original.calls) == 3 and options["operator"].calls == []
    assert all(original.calls[0][name] is value for name, value in arguments.items())
    assert status().fallbacks == {reason: 3} and status().etap_calls == 0
    assert f"calls left to upstream: 3: {reason}" in str(status())
    logged = [r for r in caplog.records if reason in r.getMessage()]
    assert len(logged) == (0 if arguments["qv"] is None else 1)  # once; nothing for calls that are none of our business
    reset_counts()
    assert status().fallbacks == {}


def test_upstreams_own_errors_come_through(fa3: ModuleType, options: dict[str, Any]) -> None:
    enable(FA3, **options)
    with pytest.raises(TypeError, match="nonsense"):
        getattr(fa3, F)(**kvcache_call(), nonsense=1)
    with pytest.raises(TypeError, match="missing"):
        getattr(fa3, F)(qv=kvcache_call()["qv"])
    assert set(status().fallbacks) == {"unknown keyword nonsense", "a required argument is missing"}


@pytest.mark.parametrize("by_environment", [True, False])
def test_strict(
    fa3: ModuleType, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    if by_environment:
        monkeypatch.setenv("ETAP_STRICT", "1")
    enable(FA3, **options, **({} if by_environment else {"strict": True}))
    original = fa3.flash_attn_with_kvcache.__wrapped__
    with pytest.raises(FallbackError, match=r"softcap: q_rope \(2, 1, 16, 64\) bfloat16 cpu, .*softcap=1.0"):
        getattr(fa3, F)(**kvcache_call(softcap=1.0))
    assert original.calls == []
    assert getattr(fa3, F)(**kvcache_call()) == "out"
    assert getattr(fa3, F)(**kvcache_call(qv=None)) == "upstream"  # no MLA call: no fall-back either


def test_strict_can_be_overruled(fa3: ModuleType, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETAP_STRICT", "1")
    with patched(FA3, **options, strict=False):
        assert getattr(fa3, F)(**kvcache_call(softcap=1.0)) == "upstream"


def test_without_a_gpu_everything_is_left_to_upstream(fa3: ModuleType) -> None:
    enable(FA3)
    assert getattr(fa3, F)(**kvcache_call()) == "upstream"
    assert status().fallbacks == {"the tensors are not on a CUDA device": 1}


def test_lazy_modules_are_not_woken(fa3: ModuleType, options: dict[str, Any]) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"woken by {name}")

    sys.modules["lazy"] = Lazy("lazy")
    sys.modules["no_module"] = object()  # type: ignore[assignment]
    enable(FA3, **options)
    disable()


def test_the_package_exports_it_lazily() -> None:
    import etap_integration

    for name in ("enable", "disable", "patched", "status", "supports"):
        assert name in etap_integration.__all__ and getattr(etap_integration, name) is getattr(dispatch, name)
    code = "import sys, etap_integration; assert 'torch' not in sys.modules; etap_integration.status()"
    subprocess.run([sys.executable, "-c", code], check=True)
