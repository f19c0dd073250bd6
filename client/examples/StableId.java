import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;

/**
 * The INT64 that trirank sends for a text id (docs/data.md): BLAKE2b (RFC 7693) of 8 bytes, shifted right by one bit.
 *
 * <p>java -Dfile.encoding=UTF-8 client/examples/StableId.java SKU-1
 */
public final class StableId {
    private static final long[] IV = {
        0x6a09e667f3bcc908L, 0xbb67ae8584caa73bL, 0x3c6ef372fe94f82bL, 0xa54ff53a5f1d36f1L,
        0x510e527fade682d1L, 0x9b05688c2b3e6c1fL, 0x1f83d9abfb41bd6bL, 0x5be0cd19137e2179L,
    };
    private static final String[] SIGMA = {
        "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
        "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
    };

    private StableId() {}

    /** Never negative. */
    public static long of(String text) {
        byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
        int blocks = Math.max(1, (bytes.length + 127) / 128);
        ByteBuffer data = ByteBuffer.allocate(blocks * 128).order(ByteOrder.LITTLE_ENDIAN);
        data.put(bytes);
        long[] h = IV.clone();
        h[0] ^= 0x01010008L; // no key, 8 bytes
        for (int block = 0; block < blocks; block++) {
            long[] v = new long[16];
            System.arraycopy(h, 0, v, 0, 8);
            System.arraycopy(IV, 0, v, 8, 8);
            boolean last = block == blocks - 1;
            v[12] ^= last ? bytes.length : (block + 1) * 128L;
            if (last) {
                v[14] = ~v[14];
            }
            for (int round = 0; round < 12; round++) {
                String s = SIGMA[round % 10];
                for (int at = 0; at < 8; at++) {
                    int shift = at / 4, j = at % 4; // columns, then diagonals
                    long x = data.getLong(block * 128 + 8 * Character.digit(s.charAt(2 * at), 16));
                    long y = data.getLong(block * 128 + 8 * Character.digit(s.charAt(2 * at + 1), 16));
                    mix(v, j, 4 + (j + shift) % 4, 8 + (j + 2 * shift) % 4, 12 + (j + 3 * shift) % 4, x, y);
                }
            }
            for (int at = 0; at < 8; at++) {
                h[at] ^= v[at] ^ v[at + 8];
            }
        }
        return h[0] >>> 1;
    }

    private static void mix(long[] v, int a, int b, int c, int d, long x, long y) {
        v[a] += v[b] + x;
        v[d] = Long.rotateRight(v[d] ^ v[a], 32);
        v[c] += v[d];
        v[b] = Long.rotateRight(v[b] ^ v[c], 24);
        v[a] += v[b] + y;
        v[d] = Long.rotateRight(v[d] ^ v[a], 16);
        v[c] += v[d];
        v[b] = Long.rotateRight(v[b] ^ v[c], 63);
    }

    public static void main(String[] texts) {
        for (String text : texts) {
            System.out.println(of(text));
        }
    }
}
