"""Flags of other programs are answered with what stands here in their place, and files with what makes a folder."""

import pytest

from packforcing_jax.cli import field_flags, main


def said(capsys, *words):
    assert main.main([*words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--height", "--set latent=(ROWS,COLUMNS)"),
        ("--width=832", "--set latent=(ROWS,COLUMNS)"),
        ("--num_frames", "--seconds or --blocks"),
        ("--num-frames", "--seconds or --blocks"),
        ("--lora", "packforcing convert BASE LORA --out DIR"),
        ("--negative_prompt", "did you mean --negative-prompt"),
        ("--guidance_scale", "did you mean --guidance-scale"),
        ("--num_inference_steps", "--set sample.steps"),
        ("--ckpt_dir", "--weights"),
        ("--dtype", "--set dtypes.compute"),
        ("--Flow-Shift", "--set sample.shift"),
        ("--image", "text alone"),
    ],
)
def test_a_flag_of_the_field_is_answered_with_what_we_have(capsys, flag, named):
    sentence = said(capsys, "sample", "--prompt", "x", flag, "5")
    assert f"sample has no flag {flag.partition('=')[0]}; " in sentence
    assert named in sentence


def test_any_other_flag_is_answered_with_the_nearest(capsys):
    assert "did you mean --blocks?" in said(capsys, "sample", "--blok", "5")
    assert len(said(capsys, "sample", "--" + "x" * 5000)) < 1500


def test_no_flag_of_ours_stands_in_the_table():
    for verb in main.VERBS:
        parser, _ = main.parser_of(verb)
        for flag in parser._option_string_actions:
            remedy = field_flags.instead(flag)
            assert remedy is None or flag not in remedy, (verb, flag)


@pytest.mark.parametrize("verb", ["sample", "evaluate", "bench", "prepare"])
def test_a_file_of_weights_is_to_be_converted_first(tmp_path, capsys, verb):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"x")
    more = [str(tmp_path), "--out", str(tmp_path / "o")] if verb == "prepare" else []
    sentence = said(capsys, verb, *more, "--weights", str(file))
    assert f"--weights {file} is a file, not a model folder" in sentence
    assert f"packforcing convert {file} --out DIR" in sentence
