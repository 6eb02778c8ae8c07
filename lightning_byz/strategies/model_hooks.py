"""The hooks of the strategy that are about where the model lies. If it is sharded, each hands over
to `ModelShards`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_byz.strategies.model_shards import ModelShards
from lightning_byz.strategies.process_hooks import ProcessHooks


class ModelHooks(ProcessHooks):
    """How the model is set up, saved and loaded.

    Attributes:
        shards: the sharded model; None: every process has a whole one.
    """

    shards: ModelShards | None

    def setup(self, trainer: Any) -> None:
        if self.shards is not None:
            self.shards.prepare(trainer)
        super().setup(trainer)
        if self.shards is not None:
            self.shards.name_parameters()

    def teardown(self) -> None:
        if self.shards is None:
            super().teardown()
            return
        self.shards.leave()  # its parts stay where they are
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator):
            if part is not None:
                part.teardown()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        if self.shards is None:
            with super().tensor_init_context(empty_init):
                yield
            return
        with self.shards.tensor_init_context(empty_init):
            yield

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether checkpoints are loaded into a model that has been set up."""
        return self.shards is not None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.shards is None:
            return super().lightning_module_state_dict()
        return self.shards.model_state()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.shards is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            self.shards.load_model_state(checkpoint, strict)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        write = super().save_checkpoint
        if self.shards is None:
            write(checkpoint, filepath, storage_options=storage_options)
        else:
            self.shards.save(checkpoint, filepath, storage_options, write)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if self.shards is None:
            return dict(super().load_checkpoint(checkpoint_path, weights_only))
        return self.shards.load(checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.shards is None:  # else `load_checkpoint` has done it
            super().load_optimizer_state_dict(checkpoint)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if self.shards is None:
            return super().optimizer_state(optimizer)
        return self.shards.optimizer_state(optimizer)
