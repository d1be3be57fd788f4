"""vLLM's TieringOffloadingSpec for an engine that computes on the CPU.

vLLM 0.32 refuses to offload from a CPU device in one place only: the worker that copies blocks
between the device and host memory. This subclass puts a copy between two tensors there; lookup,
promotion, cascade and the `fs` tier are vLLM's own. On a GPU the stock spec is used.

vLLM imports it by name (`spec_module_path`); it never imports kvfs.
"""

from __future__ import annotations

import time

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuDeviceWorker(OffloadingWorker):
    """Copies whole blocks inside submit_*; only the engine's own thread calls it."""

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._finished: list[TransferResult] = []
        self._views = [
            (cache.tensor, region.create_next_worker_view(cache.page_size_bytes))
            for cache in caches.tensors
        ]
        self._block_bytes = sum(cache.page_size_bytes for cache in caches.tensors)

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, to_host=False)

    def _copy(
        self, job_id: int, device_spec: GPULoadStoreSpec, host_spec: LoadStoreSpec, *, to_host: bool
    ) -> bool:
        assert isinstance(host_spec, CPULoadStoreSpec)
        started = time.perf_counter()
        blocks = torch.from_numpy(device_spec.block_ids).long()
        chunks = torch.from_numpy(host_spec.chunk_ids).long()
        assert len(blocks) == len(chunks), "one block per chunk: leave blocks_per_chunk at 1"
        for device, host in self._views:
            if to_host:
                host[chunks] = device[blocks]
            else:
                device[blocks] = host[chunks]
        copied_bytes = len(blocks) * self._block_bytes
        self._finished.append(
            TransferResult(job_id, True, copied_bytes, time.perf_counter() - started)
        )
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every job is done when it was submitted."""

    def shutdown(self) -> None:
        self._views.clear()
        self._region.cleanup()


class CpuDeviceTieringSpec(TieringOffloadingSpec):
    """The stock spec with a worker that takes a CPU device; one instance per engine process."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            assert len(kv_caches.group_data_refs) == 1, "a model with one KV cache group"
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CpuDeviceWorker(kv_caches, region)
        return self._worker
