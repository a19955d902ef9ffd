"""Judge: the present champion on the same data as the candidates."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(data: dsl.Input[dsl.Dataset], num_beams: int, limit: int, output: str) -> str:
    """Return the URI of the champion's evaluation under `output`, or an empty string if there is no champion yet."""
    from model_lib.candidates import judge_champion
    from model_lib.tracking import tracking_from_environment

    return judge_champion(data.path, output, tracking_from_environment(), num_beams=num_beams, limit=limit)
