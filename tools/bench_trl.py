"""The peer of bench.py: TRL's DDPOTrainer on the tiny Stable Diffusion, at the work of bench.py's own iteration.

Not for use by hand. bench.py --trl PYTHON starts it under the Python of another environment, which needs trl==0.12.2,
transformers==4.46.3, diffusers==0.31.0, accelerate==1.1.1, peft==0.13.2 and huggingface_hub<0.27. For each line on
standard input it takes one step and prints its seconds. For the line "operators" it prints what torch's profiler says of
the step, {operator: (seconds, calls)}. The last line that it prints is its peak memory in GiB.
"""

import itertools
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

TINY = Path(__file__).resolve().parents[1] / "tiny"
STEPS, MICRO_BATCH, MICRO_BATCHES, GUIDANCE = 12, 72, 2, 2.0


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


def main():
    prompts = itertools.cycle((TINY / "prompts.txt").read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        config = DDPOConfig(
            mixed_precision="no", allow_tf32=False, save_freq=10**9, project_kwargs={"project_dir": folder},
            sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE, sample_batch_size=MICRO_BATCH,
            sample_num_batches_per_epoch=MICRO_BATCHES, train_batch_size=MICRO_BATCH,
            train_gradient_accumulation_steps=MICRO_BATCHES, train_cfg=True, train_timestep_fraction=1.0,
        )  # fmt: skip
        model = shutil.copytree(TINY / "sd14", Path(folder, "sd14"))
        index = model / "model_index.json"  # transformers 4 knows the tokenizer's class by its older name
        index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        pipeline = DefaultDDPOStableDiffusionPipeline(str(model), use_lora=False)
        pipeline.sd_pipeline.to(torch.float32)
        trainer = DDPOTrainer(config, brightness, lambda: (next(prompts), {}), pipeline)
        for epoch, line in enumerate(sys.stdin):
            if line == "operators\n":
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    trainer.step(epoch, epoch)
                said = {op.key: (op.self_cpu_time_total / 1e6, op.count) for op in profile.key_averages()}
                print(json.dumps(said), flush=True)
                continue
            start = time.perf_counter()
            trainer.step(epoch, epoch)
            print(f"seconds {time.perf_counter() - start:.3f}", flush=True)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the profiler takes its own
    print(f"gib {peak:.2f}", flush=True)


if __name__ == "__main__":
    main()
