import torch

from masm_ext.ops.strategies import ADDMM, REFERENCE, SINGLE, STREAM, Call, choose


def test_few_rows_stream_where_the_cuda_library_is_loaded():
    def chosen(M, IN, R, dtype=torch.bfloat16, library=True, **more):
        return choose(Call(M, 1024, IN, R, 1, dtype, 90, cuda_library=library, **more))

    assert chosen(16, 4096, 17) == chosen(1, 2048, 64) == STREAM
    # not without the library, and not if every block would read too much of x
    assert chosen(16, 4096, 17, library=False) == chosen(17, 4096, 17) == chosen(16, 1024, 64) == SINGLE
    # never for dX
    assert chosen(16, 4096, 16, library=False, backward=True) == SINGLE
    assert chosen(64, 4096, 64, torch.float32, library=False, backward=True) == REFERENCE
    # more rows or directions than the kernels serve
    assert chosen(65, 1024, 16, torch.float32) == ADDMM and chosen(64, 1024, 65, torch.float32) == REFERENCE
    assert chosen(1, 4096, 16, torch.float64) == REFERENCE
