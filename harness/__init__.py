"""What every run needs and no paper mentions. Nothing in here is part of the method.

  command_line   types and refusals of flags, prompt files, image files
  models         configs and weights of diffusers' models, LoRA, precision, shards of FSDP2, the export
  processes      torchrun, devices, the folder of a run; what each random draw depends on; encoded prompts
  report         lines on the screen, metrics.jsonl and its warnings, pictures of held-out samples, curve.png
  checkpoints    written whole or not at all; a resumed run repeats the unbroken run bit for bit

The grpo_*.py scripts call these functions; none of them calls a script. Slow imports stand inside the functions that
need them, so that a mistyped flag is refused at once.
"""

import os
import sys
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences its advice to install torchvision
for harmless in ("local_dir_use_symlinks", "torch.distributed is disabled", "FSDP2-wrapped", "Corrupt EXIF", "Glyph"):
    warnings.filterwarnings("ignore", message=f".*{harmless}")
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a message that the terminal cannot show never ends a run
        stream.reconfigure(errors="backslashreplace")

from .command_line import HERE, LOCAL_RANK, RANK, WORLD, Refused, RunError, refuse
from .command_line import count, fraction, fraction_below_1, guidance, guidance_from_1, not_negative
from .command_line import pixels, positive, scale, up_to_1000, whole
from .command_line import add_run_flags, captioned_images, make_parser, parse, read_image, read_prompts
from .models import add_lora, as_in_training, check_memory, check_size, clip_gradients
from .models import from_pretrained, load_text_encoders, loading, other_weights, prepare_policy, read_config
from .processes import check_finite, conditions, everyone, on_device, prompts_of_step, seeded, share, stack
from .processes import start_run, wait
from .report import check_ratio, draw_curves, draw_samples, evaluation_is_due, figures_of, finish, metrics_of
from .report import print_header, record, say, show, tqdm
from .checkpoints import check_run, iterations, keep_last_iteration, open_folder, save_checkpoint
