// The INT64 that trirank sends for a text id (docs/data.md): BLAKE2b (RFC 7693) of 8 bytes, shifted right by one bit.
//
//	go run client/examples/stable_id.go SKU-1
package main

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
)

var iv = [8]uint64{
	0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
	0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
}

var sigma = [10][16]int{
	{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
	{11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
	{9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
	{12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
	{6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
}

// StableID is never negative.
func StableID(text string) int64 {
	blocks := max(1, (len(text)+127)/128)
	data := make([]byte, blocks*128)
	copy(data, text)
	h := iv
	h[0] ^= 0x01010008 // no key, 8 bytes
	for block := 0; block < blocks; block++ {
		var m [16]uint64
		for at := range m {
			m[at] = binary.LittleEndian.Uint64(data[block*128+at*8:])
		}
		var v [16]uint64
		copy(v[:8], h[:])
		copy(v[8:], iv[:])
		if block == blocks-1 {
			v[12] ^= uint64(len(text))
			v[14] = ^v[14]
		} else {
			v[12] ^= uint64((block + 1) * 128)
		}
		mix := func(a, b, c, d int, x, y uint64) {
			v[a] += v[b] + x
			v[d] = bits.RotateLeft64(v[d]^v[a], -32)
			v[c] += v[d]
			v[b] = bits.RotateLeft64(v[b]^v[c], -24)
			v[a] += v[b] + y
			v[d] = bits.RotateLeft64(v[d]^v[a], -16)
			v[c] += v[d]
			v[b] = bits.RotateLeft64(v[b]^v[c], -63)
		}
		for round := 0; round < 12; round++ {
			s := sigma[round%10]
			for at := 0; at < 8; at++ {
				shift, j := at/4, at%4 // columns, then diagonals
				mix(j, 4+(j+shift)%4, 8+(j+2*shift)%4, 12+(j+3*shift)%4, m[s[2*at]], m[s[2*at+1]])
			}
		}
		for at := range h {
			h[at] ^= v[at] ^ v[at+8]
		}
	}
	return int64(h[0] >> 1)
}

func max(a, b int) int {
	if a > b {
		return a
	}
	return b
}

func main() {
	for _, text := range os.Args[1:] {
		fmt.Println(StableID(text))
	}
}
